"""Ranks that share a pass: each with a slice of its tokens, all with the results of one rank."""

import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.multi_threaded_pg import (
    _install_threaded_pg,
    _uninstall_threaded_pg,
)

from flash.trainer.critic import TokenValuer
from flash.trainer.layers import recompute_activations
from flash.trainer.router_replay import Routers
from flash.trainer.scorer import TokenScorer
from flash.trainer.self_test import check_replay
from flash.trainer.sequence_parallel import SequenceGroup, check_config
from flash.types import UNKNOWN_EXPERT
from tests.families import save_family
from tests.packed import load_packed

T = TypeVar("T")
Found = tuple[Tensor, dict[str, Tensor]]
ModelOf = Callable[[str], Any]
LENGTHS = (3, 1, 40, 9)  # 53 tokens, which neither 2 nor 4 ranks can divide
KINDS = [
    "llama",  # with 4 ranks each head of keys is sent to two of them
    "qwen2",  # windows
    "cohere",  # logits of its own
    "gpt2",  # learned positions
    "qwen3_moe",  # experts
    "deepseek_v3",  # keys and values of other widths
    "diffllama",  # attention in two halves
    "afmoe",  # views of what attention answers
]


@pytest.fixture
def on_ranks() -> Iterator[Callable[[int, Callable[[], T]], list[T]]]:
    """Calls a function on so many ranks, threads of this process; what each answers."""
    _install_threaded_pg()

    def call(ranks: int, function: Callable[[], T]) -> list[T]:
        store = dist.HashStore()
        met = threading.Barrier(ranks)

        def as_rank(rank: int) -> T:
            dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
            try:
                return function()
            finally:
                met.wait(60)
                dist.destroy_process_group()

        with ThreadPoolExecutor(ranks) as pool:
            return list(pool.map(as_rank, range(ranks)))

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    yield call
    torch._C._distributed_c10d._set_thread_isolation_mode(False)
    _uninstall_threaded_pg()


@pytest.fixture
def model_of(tmp_path: Path) -> Callable[[str], Any]:
    """A tiny random model of a type, with windows if it can have them."""

    def model_of(kind: str) -> Any:
        save_family(tmp_path, kind)
        return load_packed(tmp_path)

    return model_of


TOKEN_IDS_N = torch.arange(sum(LENGTHS)) * 31 % 97
# Not those of first tokens; none of the last slice but one.
SCORED_T = torch.tensor([1, 2, 5, 6, 20, 21, 25, 26, 43, 45, 52])


def with_gradients(module: nn.Module, told: Tensor) -> Found:
    """What it told, and the gradients of a loss of it."""
    parameters = dict(module.named_parameters())
    loss = (told * torch.linspace(-1, 1.5, told.shape[-1])).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return told.detach(), dict(zip(parameters, gradients, strict=True))


def scored(scorer: TokenScorer, **settings: Any) -> Found:
    return with_gradients(scorer, scorer(TOKEN_IDS_N, LENGTHS, SCORED_T, **settings))


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_have_one_ranks_logprobs_and_its_gradient_in_parts(
    model_of: ModelOf, kind: str, ranks: int, on_ranks: Any
) -> None:
    model = model_of(kind)

    def shared() -> Found:
        return scored(TokenScorer(deepcopy(model), group=SequenceGroup.of(ranks, "cpu")))

    same_in_parts(on_ranks(ranks, shared), scored(TokenScorer(model)))


def same_in_parts(found: list[Found], whole: Found) -> None:
    """All of it on each rank, and of the gradient each rank a part."""
    for told, _ in found:
        torch.testing.assert_close(told, whole[0], atol=1e-5, rtol=0)
    for name, gradient in whole[1].items():
        parts = sum(gradients[name] for _, gradients in found)
        torch.testing.assert_close(parts, gradient, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"with_entropy": True}, {"with_size": True}])
def test_what_else_is_told_is_whole_with_recomputed_activations_and_logits_in_chunks(
    model_of: ModelOf, settings: dict[str, bool], on_ranks: Any
) -> None:
    model = model_of("llama")
    told = {**settings, "temperatures_T": torch.linspace(0.5, 1.5, len(SCORED_T))}

    def shared() -> Found:
        own = deepcopy(model)
        recompute_activations(own)
        group = SequenceGroup.of(2, "cpu")
        return scored(TokenScorer(own, kept_logits=97 * 2, group=group), **told)

    same_in_parts(on_ranks(2, shared), scored(TokenScorer(model), **told))


@pytest.mark.parametrize("ranks", [2, 4])
def test_routers_take_the_experts_of_their_slices_and_tell_of_all(
    model_of: ModelOf, ranks: int, on_ranks: Any
) -> None:
    """Others than they would choose, and of some tokens none, with recomputed activations."""
    model = model_of("qwen3_moe")

    def replayed(group: SequenceGroup | None) -> tuple[Found, list[Tensor]]:
        own = deepcopy(model)
        recompute_activations(own)
        scorer = TokenScorer(own, group=group)
        scorer.routers = routers = Routers(own, group=group)
        check_replay(scorer)
        with torch.no_grad():
            scorer(TOKEN_IDS_N, LENGTHS, SCORED_T)
        experts_NR = routers.others()[: len(TOKEN_IDS_N)]
        experts_NR[::3] = routers.chosen()[: len(TOKEN_IDS_N) : 3]
        experts_NR[45:48] = UNKNOWN_EXPERT
        told = scorer(TOKEN_IDS_N, LENGTHS, SCORED_T, experts_NR=experts_NR)
        of_all = [experts_NR, *routers.differing()]
        return with_gradients(scorer, told), [each[: len(TOKEN_IDS_N)] for each in of_all]

    def shared() -> tuple[Found, list[Tensor]]:
        return replayed(SequenceGroup.of(ranks, "cpu"))

    whole, of_all = replayed(None)
    found = on_ranks(ranks, shared)
    same_in_parts([each for each, _ in found], whole)
    assert (whole[0] - scored(TokenScorer(model))[0]).abs().max() > 1e-3, "others say another thing"
    assert 0 < float(of_all[1].mean()) < 1 and of_all[2].sum() == len(TOKEN_IDS_N) - 3
    for _, told in found:
        for mine, expected in zip(told, of_all, strict=True):
            assert torch.equal(mine, expected)


def test_a_weight_that_one_rank_misses_is_known_to_all(model_of: ModelOf, on_ranks: Any) -> None:
    """Else one of them would refuse a model that the others go on with."""
    model = model_of("qwen3_moe")

    def scored_everywhere() -> bool:
        own, group = deepcopy(model), SequenceGroup.of(2, "cpu")
        assert group is not None
        routers = Routers(own, group=group)
        routers.take(torch.zeros(len(TOKEN_IDS_N), 4, dtype=torch.int16))
        with torch.no_grad():
            TokenScorer(own, group=group)(TOKEN_IDS_N, LENGTHS, SCORED_T)
        assert routers.all_scored()
        if group.place == 1:
            routers._routers[0].scores_NK[3] = 0
        return routers.all_scored()

    assert on_ranks(2, scored_everywhere) == [False, False]


def test_a_critic_values_what_it_values_alone(model_of: ModelOf, on_ranks: Any) -> None:
    model = model_of("llama")
    valuer = TokenValuer(model)
    torch.nn.init.normal_(valuer.head.weight)

    def valued(valuer: TokenValuer) -> Found:
        return with_gradients(valuer, valuer(TOKEN_IDS_N, LENGTHS, SCORED_T))

    def shared() -> Found:
        own = deepcopy(valuer)
        own.group = SequenceGroup.of(4, "cpu")
        return valued(own)

    same_in_parts(on_ranks(4, shared), valued(valuer))


def test_ranks_of_which_nothing_is_asked_take_part(model_of: ModelOf, on_ranks: Any) -> None:
    """Two tokens on four ranks: half of these have padding alone, and three nothing to score."""
    model = model_of("llama")

    def score(scorer: TokenScorer) -> Found:
        return with_gradients(scorer, scorer(torch.tensor([5, 6]), (2,), torch.tensor([1])))

    def shared() -> Found:
        return score(TokenScorer(deepcopy(model), group=SequenceGroup.of(4, "cpu")))

    same_in_parts(on_ranks(4, shared), score(TokenScorer(model)))


def test_groups_are_of_ranks_that_follow_each_other(on_ranks: Any) -> None:
    def ranks() -> tuple[int, list[int], list[int]]:
        group = SequenceGroup.of(2, "cpu")
        assert group is not None
        of = dist.get_process_group_ranks
        return group.place, of(group.group), of(group.across)

    assert on_ranks(4, ranks) == [
        (0, [0, 1], [0, 2]),
        (1, [0, 1], [1, 3]),
        (0, [2, 3], [0, 2]),
        (1, [2, 3], [1, 3]),
    ]


def test_slices_of_all_heads_become_heads_of_all_tokens_and_slices_again(on_ranks: Any) -> None:
    """Values of another width than keys, as in latent attention; fewer keys than ranks."""
    query, key = torch.randn(1, 3, 12, 8), torch.randn(1, 1, 12, 8)
    value = torch.randn(1, 1, 12, 5)

    def exchanged() -> tuple[Tensor, ...]:
        group = SequenceGroup.of(3, "cpu")
        assert group is not None
        own = (slice(None), slice(None), slice(4 * group.place, 4 * group.place + 4))
        parts = group.by_heads(query[own], key[own], value[own])
        back = group.by_tokens(parts[0].transpose(1, 2))
        assert torch.equal(back, query[own].transpose(1, 2))
        assert back.is_contiguous()
        return tuple(part.clone() for part in parts)

    found = on_ranks(3, exchanged)
    assert torch.equal(torch.cat([part for part, _, _ in found], dim=1), query)
    for whole, of_ranks in ((key, [k for _, k, _ in found]), (value, [v for _, _, v in found])):
        assert torch.equal(torch.cat(of_ranks, dim=1), whole.repeat_interleave(3, dim=1))


def test_heads_that_the_ranks_do_not_divide_are_refused(model_of: ModelOf, on_ranks: Any) -> None:
    says = "sequence_ranks=3 does not divide the model's 4 attention heads, .* a divisor of 4"
    check_config(model_of("llama").config, 2)
    with pytest.raises(ValueError, match=says):
        check_config(model_of("llama").config, 3)

    def refused() -> str:
        group = SequenceGroup.of(3, "cpu")
        assert group is not None
        heads = torch.zeros(1, 4, 2, 8)
        with pytest.raises(ValueError) as raised:
            group.by_heads(heads, heads, heads)
        return str(raised.value)

    for refusal in on_ranks(3, refused):
        assert re.search(says, refusal)
