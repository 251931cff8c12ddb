"""How many tokens a pass is given, and whether it recomputes, where that is left to the ranks."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig

from flash.fakes import FakeRanks, fake_sample
from flash.trainer import sharding
from flash.trainer.config import TOKENS_OF_PASS, TrainerConfig
from flash.trainer.fused import can_fuse, fuse, fuse_layers
from flash.trainer.layers import keep_activations, recompute_activations
from flash.trainer.model_files import empty_model
from flash.trainer.passes import Room
from flash.trainer.room import room_of, to_come, tokens_that_fit
from flash.trainer.scorer import TokenScorer
from flash.trainer.sharding import make_optimizer
from flash.trainer.trainer import Trainer
from flash.types import Batch
from tests.packed import load_packed

SaveModel = Callable[..., Path]
CHOSEN = ("trainer/tokens_per_pass", "trainer/recomputes")


def loaded(save_model: SaveModel, folder: Path, device: str) -> tuple[TokenScorer, Any]:
    scorer = TokenScorer(load_packed(save_model(folder))).to(device)
    return scorer, make_optimizer(scorer, TrainerConfig(), learning_rate=1e-3)


@pytest.mark.parametrize(
    ("free_gb", "token_mb", "tokens"),
    [(100, 4, 17_408), (100, 0.5, 139_264), (0.1, 4, 1024), (-3, 4, 1024)],
)
def test_a_pass_has_what_fits_in_steps_that_make_sense(free_gb, token_mb, tokens):
    assert tokens_that_fit(free_gb * 1e9, token_mb * 1e6) == tokens


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("unit", [0, 1 << 62])
def test_of_layers_that_are_gathered_one_by_one_few_are_there_at_a_time(
    unit: int, adapted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "_ONE_UNIT_PARAMETERS", unit)
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=32, num_hidden_layers=20,
        num_attention_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    layer, root = 4 * 16 * 16 + 3 * 16 * 32 + 2 * 16, 2 * 100 * 16 + 16
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        scorer = TokenScorer(empty_model(config, torch.float32), kept_logits=0)
        for name, parameter in scorer.named_parameters():
            parameter.requires_grad_(not adapted or "q_proj" in name)
        sharding.shard(scorer, scorer.model, ranks=4, half=True)
        optimizer = make_optimizer(scorer, TrainerConfig(), learning_rate=1e-3)
        found = to_come(scorer, optimizer)
    finally:
        dist.destroy_process_group()
    of_layer, of_root = (16 * 16, 0) if adapted else (layer, root)
    kept = 12 * (20 * of_layer + of_root) // 4
    if unit:
        whole = 2 * (20 * layer + root) + 2 * (20 * of_layer + of_root)
    else:
        whole = 2 * (root + 3 * layer) + 2 * of_root + 10 * of_layer
    assert found == kept + whole


def test_on_a_cpu_nothing_is_measured(save_model: SaveModel, tmp_path: Path) -> None:
    scorer, optimizer = loaded(save_model, tmp_path / "m", "cpu")
    assert room_of(scorer, optimizer, recomputed=None) is None


@pytest.mark.parametrize(
    ("kept", "recomputed", "tokens", "recompute"),
    [
        # 1.5 billion parameters on a small card: recomputed it trains with long passes.
        (8_192, 90_000, 32_768, True),
        (15_360, 200_000, 32_768, True),
        # As on an H200: what a third more work costs is not made up for.
        (17_408, 300_000, 17_408, False),
        (60_000, 900_000, 32_768, False),
        # Little is gained.
        (8_192, 10_240, 8_192, False),
        # A model without layers that can recompute.
        (2_048, 2_048, 2_048, False),
    ],
)
def test_activations_are_recomputed_where_that_makes_passes_quicker(
    kept: int, recomputed: int, tokens: int, recompute: bool
) -> None:
    assert Room(kept, recomputed).choose() == (tokens, recompute)


@pytest.mark.parametrize(
    ("tokens", "recompute", "chosen"),
    [
        (8_192, None, (8_192, False)),
        (16_384, None, (16_384, True)),  # which would not fit otherwise
        (16_384, False, (16_384, False)),
        (None, False, (10_240, False)),
        (None, True, (32_768, True)),
    ],
)
def test_what_is_configured_of_a_pass_stays(
    tokens: int | None, recompute: bool | None, chosen: tuple[int, bool]
) -> None:
    assert Room(10_240, 65_536).choose(tokens, recompute) == chosen


@pytest.mark.parametrize(
    ("longest", "tokens", "chosen"),
    [
        (20_480, None, (20_480, False)),
        (20_481, None, (32_768, True)),
        (20_481, 8_192, (8_192, True)),
        (90_112, None, (32_768, True)),
    ],
)
def test_activations_are_recomputed_where_the_longest_sample_needs_it(
    longest: int, tokens: int | None, chosen: tuple[int, bool]
) -> None:
    assert Room(20_480, 90_112).choose(tokens, longest=longest) == chosen


SAYS = (
    "agent.max_sequence_tokens={longest}: .* with trainer.sequence_ranks={ranks} GPUs that have "
    "nothing else to hold have room for one of {fits} tokens, activations {how}: set it to {fits} "
    "or less, {remedy}raise trainer.sequence_ranks, train adapters .*, or take GPUs of more memory"
)


@pytest.mark.parametrize(
    ("longest", "changes", "fits", "how"),
    [
        (32_768, {}, None, ""),
        (32_769, {}, 32_768, "recomputed"),
        (32_769, {"gradient_checkpointing": True}, 32_768, "recomputed"),
        (32_769, {"gradient_checkpointing": False}, 32_768, r"kept \(.*=false\)"),
        (131_072, {"sequence_ranks": 4}, None, ""),
        (131_073, {"sequence_ranks": 4}, 131_072, "recomputed"),
    ],
)
async def test_a_run_whose_longest_sample_fits_no_pass_is_refused_when_its_ranks_have_loaded(
    longest: int, changes: dict[str, Any], fits: int | None, how: str, tmp_path: Path
) -> None:
    """Of several ranks the one with the least room counts."""
    rooms = {"start": "", "room": Room(8_192, 32_768)}
    config = TrainerConfig(ranks=4, **changes)
    ranks = FakeRanks(rooms)
    trainer = Trainer(model="none", config=config, run_dir=tmp_path, starter=ranks, longest=longest)
    refused = contextlib.nullcontext()
    if fits is not None:
        refused = pytest.raises(
            ValueError,
            match=SAYS.format(
                longest=longest,
                ranks=config.sequence_ranks,
                fits=fits,
                how=how,
                remedy="leave .* out, " if how.startswith("kept") else "",
            ),
        )
    with refused:
        async with trainer:
            pass
    for rank in ranks.started:
        assert [method for method, _ in rank.calls] == ["start", "room"]
        assert rank.calls[1][1] == (True,)
        assert not rank.alive


@pytest.mark.parametrize(
    ("rooms", "given", "chosen", "said"),
    [
        ([None, None], {}, (TOKENS_OF_PASS, False), []),
        ([None, None], {"sequence_ranks": 2}, (TOKENS_OF_PASS, False), []),
        (
            [Room(16_384, 40_960), Room(9_216, 30_720)],
            {},
            (30_720, True),
            [
                "trainer: 30,720 tokens a pass on a GPU, activations recomputed (kept, 9,216 would "
                "have room)"
            ],
        ),
        (
            [Room(20_480, 90_112)] * 2,
            {},
            (20_480, False),
            ["trainer: 20,480 tokens a pass on a GPU, activations kept"],
        ),
        (None, {"tokens_per_micro_batch": 100, "gradient_checkpointing": False}, (100, False), []),
    ],
)
async def test_ranks_are_asked_once_and_only_if_something_is_left_open(
    rooms: Any, given: Any, chosen: tuple[int, bool], said: list[str], tmp_path: Path
) -> None:
    """Of several ranks the one with the least room counts, because all pass as often."""
    told: list[str] = []
    trainer = Trainer(
        model="none",
        config=TrainerConfig(ranks=2, **given),
        run_dir=tmp_path,
        say=told.append,
    )
    asked = []

    async def call_each(method: str, arguments: list[Any], **_: Any) -> list[Any]:
        asked.append(method)
        return rooms if method == "room" else [{}, {}]

    trainer._call_each = call_each  # type: ignore[method-assign]
    for version in range(2):
        metrics = await trainer.step(Batch(samples=[fake_sample(range(9))], version=version))
    config = trainer.config
    assert (config.tokens_per_micro_batch, config.gradient_checkpointing) == chosen
    recorded = tuple(metrics[name] for name in CHOSEN if name in metrics)
    assert recorded == (chosen if said else ())  # of a GPU alone
    asks = ["room"] * (rooms is not None) + ["recompute"] * chosen[1]
    assert asked == [*asks, "step", "step"]
    assert told == said


@pytest.mark.parametrize(("longest", "recomputes"), [(40_960, False), (40_961, True)])
async def test_the_longest_sample_needs_room_on_all_ranks_that_share_its_pass(
    longest: int, recomputes: bool, tmp_path: Path
) -> None:
    ranks = FakeRanks({"start": "", "room": Room(20_480, 90_112), "recompute": None, "step": {}})
    config = TrainerConfig(ranks=2, sequence_ranks=2)
    async with Trainer(
        model="none", config=config, run_dir=tmp_path, starter=ranks, longest=longest
    ) as trainer:
        await trainer.step(Batch(samples=[fake_sample(range(9))], version=0))
        assert trainer.config.gradient_checkpointing is recomputes


def test_what_is_recomputed_can_be_kept_again(save_model: SaveModel, tmp_path: Path) -> None:
    model = load_packed(save_model(tmp_path / "m"))
    scorer = TokenScorer(model)
    calls: list[int] = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    for change in (recompute_activations, keep_activations):
        change(model)
        calls.clear()
        scorer(torch.arange(9), (9,), torch.arange(1, 9)).sum().backward()
        counts.append(len(calls))
    assert counts == [2, 1]


def test_on_a_cpu_nothing_is_fused_and_large_models_have_a_unit_for_each_layer(
    save_model: SaveModel, tmp_path: Path
) -> None:
    scorer, _ = loaded(save_model, tmp_path / "m", "cpu")
    assert not can_fuse(scorer.model)
    assert not fuse(scorer)
    if not torch.cuda.is_available():
        assert sharding._most_in_one_unit(1) == sharding._most_in_one_unit(2) == 50_000_000


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_that_is_fused_leaves_others_of_its_type_as_they_are(
    save_model: SaveModel, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("liger_kernel")
    directory = save_model(tmp_path / "m", kind)
    fused = load_packed(directory)
    fuse_layers(fused)
    assert "liger" in fused.base_model.norm.forward.__func__.__module__
    other = TokenScorer(load_packed(directory))
    assert "liger" not in other.model.base_model.norm.forward.__func__.__module__
    other(torch.arange(9), (9,), torch.arange(1, 9))  # rotary positions and all, on a CPU


@pytest.mark.gpu
def test_on_a_gpu_a_pass_of_so_many_tokens_fits(save_model: SaveModel, tmp_path: Path) -> None:
    scorer, optimizer = loaded(save_model, tmp_path / "m", "cuda")
    room = room_of(scorer, optimizer, recomputed=None)
    assert room is not None
    assert room.recomputed > room.kept
    held = torch.cuda.memory_reserved()
    alone = room_of(scorer, optimizer, recomputed=None, alone=True)
    assert alone is not None
    assert torch.cuda.memory_reserved() >= held
    assert alone.recomputed >= room.recomputed
    tokens, recompute = room.choose()
    assert tokens % 1024 == 0
    assert not recompute  # of so small a model
    assert all(parameter.grad is None for parameter in scorer.parameters())
    assert sharding._most_in_one_unit(1) > sharding._most_in_one_unit(2)
    token_ids = torch.zeros(tokens, dtype=torch.long, device="cuda")
    lengths = [64] * (tokens // 64)
    scored = torch.arange(tokens, device="cuda")
    scorer(token_ids, lengths, scored[scored % 64 > 0]).sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_on_a_gpu_fused_kernels_compute_the_same_logprobs_and_gradients(
    save_model: SaveModel, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("liger_kernel")
    scorer = TokenScorer(load_packed(save_model(tmp_path / "m", kind))).cuda()
    token_ids = torch.arange(50, device="cuda")
    scored = torch.arange(1, 50, device="cuda")

    def computed() -> list[torch.Tensor]:
        logprobs = scorer(token_ids, (50,), scored)
        return [logprobs.detach(), *torch.autograd.grad(logprobs.sum(), list(scorer.parameters()))]

    plain = computed()
    assert fuse(scorer)
    for one, other in zip(computed(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
