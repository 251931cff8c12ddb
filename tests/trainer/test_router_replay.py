"""Routers that take the experts which workers chose: logprobs, gradients, what is told of it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from numpy.typing import NDArray

from flash.fakes import fake_sample
from flash.trainer.config import LoraConfig, TrainerConfig
from flash.trainer.layers import recompute_activations
from flash.trainer.loading import sharded_scorer
from flash.trainer.micro_batch import pack
from flash.trainer.model_files import check_files
from flash.trainer.objectives.settings import KlSettings
from flash.trainer.packing import divide
from flash.trainer.rank import Rank
from flash.trainer.router_replay import Routers
from flash.trainer.scorer import TokenScorer
from flash.types import UNKNOWN_EXPERT, Sample
from tests.families import save_family

pytestmark = pytest.mark.slow

LAYERS, EXPERTS, CHOSEN = 2, 4, 2
LENGTHS = (5, 12, 3)
TOKENS = sum(LENGTHS)
Model: Any = transformers.AutoModelForCausalLM


@pytest.fixture
def alone() -> Iterator[None]:
    """The only rank."""
    store: Any = dist
    dist.init_process_group("gloo", store=store.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def scorer_of(folder: Path, *, half: bool = False, **settings: Any) -> TokenScorer:
    config = TrainerConfig(router_replay=True, **settings)
    return sharded_scorer(str(folder), config, device="cpu", half=half, replays=True)


def random_experts(tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    """Some of each token in each layer, none twice."""
    rng = np.random.default_rng(seed)
    rows = [rng.permutation(EXPERTS)[:CHOSEN] for _ in range(tokens * LAYERS)]
    return torch.from_numpy(np.stack(rows).reshape(tokens, LAYERS * CHOSEN).astype(np.int16))


def text(tokens: int = TOKENS, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(3, 97, tokens))


def of_all(scorer: TokenScorer, ids: torch.Tensor, experts: Any, lengths: Any) -> torch.Tensor:
    """Logprobs of all tokens but the first of each sequence."""
    first = torch.ones(len(ids), dtype=torch.bool)
    first[[0, *np.cumsum(lengths)[:-1]]] = False
    logprobs: torch.Tensor = scorer(ids, lengths, torch.arange(len(ids))[first], experts_NR=experts)
    return logprobs


class ByHand(torch.nn.Module):
    """A router of mixtral's or qwen3_moe's with given experts: their share of the softmax."""

    def __init__(self, router: Any, experts_NK: torch.Tensor) -> None:
        super().__init__()
        self.weight, self.experts_NK = router.weight, experts_NK

    def forward(self, hidden: torch.Tensor) -> Any:
        logits_NE = hidden.reshape(-1, hidden.shape[-1]) @ self.weight.T
        weights_NK = logits_NE.softmax(-1).gather(1, self.experts_NK)
        return logits_NE, weights_NK / weights_NK.sum(-1, keepdim=True), self.experts_NK


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_logprobs_and_gradients_are_those_of_routers_by_hand(
    kind: str, recomputed: bool, tmp_path: Path, alone: None
) -> None:
    save_family(tmp_path, kind, **({"norm_topk_prob": True} if kind == "qwen3_moe" else {}))
    ids, experts = text(), random_experts()
    scorer = scorer_of(tmp_path)
    if recomputed:
        recompute_activations(scorer.model)
    replayed = of_all(scorer, ids, experts, (TOKENS,))
    replayed.square().sum().backward()

    model = Model.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    for number, layer in enumerate(model.model.layers):
        of_layer = experts.view(TOKENS, LAYERS, CHOSEN)[:, number].long()
        layer.mlp.gate = ByHand(layer.mlp.gate, of_layer)
    logits = model(ids[None], use_cache=False).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
    expected.square().sum().backward()

    torch.testing.assert_close(replayed, expected, atol=1e-4, rtol=0)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    routers = [name for name in gradients if name.endswith("gate.weight")]
    assert len(routers) == LAYERS and all(gradients[name].abs().max() > 1e-3 for name in routers)
    for name, parameter in scorer.model.named_parameters():
        own = parameter.grad.full_tensor()
        torch.testing.assert_close(own, gradients[name], atol=1e-3, rtol=1e-3, msg=name)


def test_packed_sequences_take_their_own_experts_as_they_do_alone(
    tmp_path: Path, alone: None
) -> None:
    save_family(tmp_path, "olmoe")
    scorer = scorer_of(tmp_path)
    ids, experts = text(), random_experts()
    with torch.no_grad():
        packed = of_all(scorer, ids, experts, LENGTHS)
        each = [
            of_all(scorer, *parts, (len(parts[0]),))
            for parts in zip(ids.split(LENGTHS), experts.split(LENGTHS), strict=True)
        ]
        own = of_all(scorer, ids, None, LENGTHS)
    torch.testing.assert_close(packed, torch.cat(each), atol=1e-5, rtol=0)
    assert (packed - own).abs().max() > 0.1, "other experts say something else"


def test_what_is_not_known_the_router_chooses(tmp_path: Path, alone: None) -> None:
    save_family(tmp_path, "olmoe")
    scorer = scorer_of(tmp_path)
    ids, experts = text(), random_experts()
    assert scorer.routers is not None
    with torch.no_grad():
        own = of_all(scorer, ids, None, (TOKENS,))
        chosen = scorer.routers.chosen()
        unknown = torch.full_like(experts, UNKNOWN_EXPERT)
        assert torch.equal(of_all(scorer, ids, unknown, (TOKENS,)), own)
        assert not scorer.routers.differing()[1].any()
        mixed = torch.cat([experts[:9], unknown[9:]])
        torch.testing.assert_close(
            of_all(scorer, ids, mixed, (TOKENS,))[:8],
            of_all(scorer, ids, experts, (TOKENS,))[:8],
        )
        # After other tokens it chooses otherwise than before.
        of_all(scorer, ids, mixed, (TOKENS,))
        after = torch.cat([experts[:9], scorer.routers.chosen()[9:]])
        torch.testing.assert_close(
            of_all(scorer, ids, mixed, (TOKENS,)), of_all(scorer, ids, after, (TOKENS,))
        )
    assert chosen.shape == (TOKENS, LAYERS * CHOSEN) and chosen.dtype == torch.int16


def test_workers_routing_takes_the_trainers_logprobs_to_theirs(tmp_path: Path, alone: None) -> None:
    """A worker in bfloat16 and a trainer in float32 differ most where routers choose otherwise."""
    save_family(tmp_path, "mixtral", num_local_experts=16, num_experts_per_tok=4)
    trainer = scorer_of(tmp_path)
    ids = text(200)
    worker = Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    routers = Routers(worker)
    with torch.no_grad():
        logits = worker(ids[None], use_cache=False).logits[0, :-1].float()
        theirs = logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        chosen = routers.chosen()
        own = of_all(trainer, ids, None, (200,))
        replayed = of_all(trainer, ids, chosen, (200,))
    assert trainer.routers is not None
    share, known = trainer.routers.differing()
    assert known.all() and 0 < float(share.mean()) < 0.5
    before, after = ((each - theirs).square().mean().item() for each in (own, replayed))
    assert after < before / 2, (before, after)


def test_half_precision_and_adapters_take_them_too(tmp_path: Path, alone: None) -> None:
    save_family(tmp_path, "mixtral")
    ids, experts = text(), random_experts()
    with torch.no_grad():
        expected = of_all(scorer_of(tmp_path), ids, experts, (TOKENS,))
        own = of_all(scorer_of(tmp_path), ids, None, (TOKENS,))
        half = of_all(scorer_of(tmp_path, half=True), ids, experts, (TOKENS,))
    assert (half - expected).abs().mean() < (own - expected).abs().mean() / 4
    lora = LoraConfig(rank=2, targets=("q_proj",))
    config = TrainerConfig(router_replay=True, lora=lora)
    adapted = sharded_scorer(
        str(tmp_path), config, device="cpu", half=False, adapters=1, replays=True
    )
    with torch.no_grad():
        with_adapters = of_all(adapted, ids, experts, (TOKENS,))
    torch.testing.assert_close(with_adapters, expected, atol=1e-4, rtol=0)


# ── a rank's step ────────────────────────────────────────────────────────────────────────────


def sample(experts: NDArray[np.int16] | None, *, seed: int = 0, tokens: int = 12) -> Sample:
    mask = (np.arange(tokens) >= tokens // 2).astype(np.float32)
    made = fake_sample(
        text(tokens, seed).numpy(), mask, logprobs=-3 * mask,
        versions=np.where(mask > 0, 0, -1), advantage=1.0, episode=seed,
    )  # fmt: skip
    return replace(made, experts=experts)


def step(
    folder: Path, samples: list[Sample], reference: Path | None = None, **settings: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Metrics, and the weights after it."""
    config = TrainerConfig(router_replay=True, learning_rate=1e-2, warmup_steps=0, **settings)
    rank = Rank()
    refused = rank.start(str(folder), None, config, 0, 1, None, 0, reference and str(reference))
    try:
        assert not refused, refused
        metrics = rank.step(divide(samples, config)[0], 0)
        weights = {n: p.full_tensor().clone() for n, p in rank._model.named_parameters()}
    finally:
        dist.destroy_process_group()
    return metrics, weights


def test_a_step_tells_in_how_many_layers_the_trainer_would_have_chosen_others(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    save_family(folder, "mixtral")
    ids = sample(None).token_ids
    model = Model.from_pretrained(folder, dtype=torch.float32)
    routers = Routers(model)
    with torch.no_grad():
        model(torch.from_numpy(ids)[None], use_cache=False)
    own = routers.chosen().numpy().copy()

    def told(experts: NDArray[np.int16], **settings: Any) -> float:
        return step(folder, [sample(experts)], **settings)[0]["mismatch/experts"]

    assert told(own) == 0
    # In another order they are the same experts; of the last layer nothing later depends on it.
    turned = own.copy()
    turned[:, -CHOSEN:] = own[:, -CHOSEN:][:, ::-1]
    assert told(turned) == 0
    others = own.copy()
    others[:, -CHOSEN:] = (own[:, -CHOSEN:] + 1) % EXPERTS
    differs = np.mean(
        [set(a) != set(b) for a, b in zip(own[5:11, -CHOSEN:], others[5:11, -CHOSEN:], strict=True)]
    )
    assert told(others) == pytest.approx(differs / LAYERS)
    assert told(others, gradient_checkpointing=True) == pytest.approx(differs / LAYERS)
    # Of tokens that nobody knows the experts of nothing is told.
    half = others.copy()
    half[8:] = UNKNOWN_EXPERT
    differs = np.mean(
        [set(a) != set(b) for a, b in zip(own[5:8, -CHOSEN:], others[5:8, -CHOSEN:], strict=True)]
    )
    assert told(half) == pytest.approx(differs / LAYERS)
    assert "mismatch/experts" not in step(folder, [sample(None)])[0]


def test_a_step_is_the_same_however_its_samples_are_packed(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_family(folder, "olmoe")
    samples = [
        sample(random_experts(12, seed).numpy() if seed != 1 else None, seed=seed)
        for seed in range(3)
    ]
    whole, weights = step(folder, samples, mini_batches=1)
    apart, same = step(folder, samples, tokens_per_micro_batch=1)
    assert apart == pytest.approx(whole, rel=1e-4, abs=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(same[name], weight, atol=1e-5, rtol=0)
    without, others = step(folder, [replace(each, experts=None) for each in samples])
    assert without["loss"] != pytest.approx(whole["loss"], rel=1e-3)
    assert any((others[name] - weights[name]).abs().max() > 1e-4 for name in weights)


def test_later_mini_batches_are_proximal_to_what_they_replay_and_the_reference_is_not(
    tmp_path: Path,
) -> None:
    """Before the weights change, the policy with its experts is its own proximal policy."""
    folder = tmp_path / "model"
    save_family(folder, "mixtral")
    samples = [sample(random_experts(12, seed).numpy(), seed=seed) for seed in range(2)]
    metrics, _ = step(folder, samples, mini_batches=2, max_grad_norm=1e-12)
    assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-5)
    kept = KlSettings(coefficient=0.1, reference=None)
    for lora in (LoraConfig(), LoraConfig(rank=2, targets=("q_proj",))):
        apart, _ = step(folder, samples, reference=folder, kl=kept, lora=lora)
        assert apart["kl_reference"] > 1e-3, "the reference chooses its experts itself"


# ── what is refused ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("qwen3", "has no routers, because it is no mixture of experts: leave trainer.router_rep"),
        ("jetmoe", "has several routers in a layer: leave trainer.router_replay out"),
    ],
)
def test_a_model_without_routers_that_are_known_is_refused_before_anything_is_started(
    kind: str, why: str, tmp_path: Path
) -> None:
    save_family(tmp_path, kind)
    check_files(str(tmp_path), field="model")
    with pytest.raises(ValueError, match=f"model=.*model_type='{kind}' {why}"):
        check_files(str(tmp_path), field="model", replays=True)


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("phimoe", {}, "PhimoeTopKRouter chooses experts in another way than by topk"),
        (
            "deepseek_v2",
            {
                "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1,
                "first_k_dense_replace": 0,
            },
            "gives no weight to experts that its routers did not choose",
        ),
    ],
)  # fmt: skip
def test_a_rule_that_can_not_be_replayed_is_refused_by_the_ranks(
    kind: str, settings: dict[str, Any], why: str, tmp_path: Path, alone: None
) -> None:
    save_family(tmp_path, kind, **settings)
    with pytest.raises(
        ValueError, match=f"trainer.router_replay=true: model_type='{kind}'.*{why}.*leave it out"
    ):
        scorer_of(tmp_path)


def test_experts_of_another_model_are_refused(tmp_path: Path, alone: None) -> None:
    save_family(tmp_path, "mixtral")
    scorer, ids, experts = scorer_of(tmp_path), text(), random_experts()
    with pytest.raises(ValueError, match="chose 2 experts for each token, where.*2 in each of 2"):
        of_all(scorer, ids, experts[:, :2], (TOKENS,))
    with pytest.raises(ValueError, match="chose the expert 4, where .* has 4 in a layer"):
        of_all(scorer, ids, experts + 1, (TOKENS,))


def test_what_is_told_of_a_layer_without_experts_is_nothing(tmp_path: Path, alone: None) -> None:
    save_family(tmp_path, "dots1")  # the first layer
    scorer, ids = scorer_of(tmp_path), text()
    with torch.no_grad():
        own = of_all(scorer, ids, None, (TOKENS,))
        assert scorer.routers is not None
        chosen = scorer.routers.chosen()
        assert (chosen[:, :CHOSEN] == UNKNOWN_EXPERT).all()
        chosen[:, :CHOSEN] = 99
        torch.testing.assert_close(of_all(scorer, ids, chosen, (TOKENS,)), own)


def test_samples_of_several_models_are_refused() -> None:
    of_two = [sample(random_experts(12).numpy()), sample(np.ones((12, 2), np.int16))]
    with pytest.raises(ValueError, match="some samples have 2 experts .* and others 4: have all"):
        pack(of_two, [1.0, 1.0], version=0, device="cpu")
