"""One rank inside the test's own process: what it computes."""

import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from transformers import AutoConfig, AutoModelForCausalLM

from flash import virtual_time
from flash.agents import EnvironmentAgent
from flash.fakes import FakeEnvs, FakeStyle, FakeWorker, fake_sample
from flash.hub.hub import InferenceHub
from flash.rollout.loop import RolloutLoop
from flash.trainer.advantage_settings import ReinforcePp
from flash.trainer.config import TrainerConfig
from flash.trainer.objectives.settings import (
    SETTINGS,
    Aggregation,
    DecoupledPpo,
    KlSettings,
    Supervised,
    Tis,
    Vanilla,
)
from flash.trainer.packing import MiniBatchShare, denominator_of, divide
from flash.trainer.rank import Rank, _keep_to
from flash.types import Batch, Sample, Task
from tests.saved import save

SamplesOf = Callable[..., list[Sample]]
SaveModel = Callable[..., Path]
Reference = Callable[[Any, list[int]], list[float]]
Model: Any = AutoModelForCausalLM


@pytest.fixture
def model(save_model: SaveModel, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


@contextlib.contextmanager
def started(
    model: Path,
    tmp_path: Path,
    config: TrainerConfig,
    checkpoint: Path | None = None,
    reference: Path | None = None,
) -> Iterator[Rank]:
    rank = Rank()
    rank.start(
        str(model),
        checkpoint and str(checkpoint),
        config,
        0,
        1,
        None,
        0,
        reference and str(reference),
    )
    try:
        yield rank
    finally:
        dist.destroy_process_group()


def step(rank: Rank, samples: list[Sample], config: TrainerConfig, version: int = 0) -> Any:
    (share,) = divide(samples, config)
    return rank.step(share, version)


def weights_of(rank: Rank) -> dict[str, torch.Tensor]:
    return {
        name: parameter.full_tensor().detach().clone()  # type: ignore[attr-defined]
        for name, parameter in rank._scorer.named_parameters()
    }


def gradients_of(rank: Rank) -> dict[str, torch.Tensor]:
    """Those of the next optimizer step, clipped; filled when it is taken."""
    gradients: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        for name, parameter in rank._scorer.named_parameters():
            gradients[name] = parameter.grad.full_tensor().clone()  # type: ignore[union-attr]

    rank._optimizer.register_step_pre_hook(keep)
    return gradients


def close(a: Mapping[str, float], b: Mapping[str, float]) -> bool:
    return a.keys() == b.keys() and all(b[k] == pytest.approx(a[k], abs=1e-6) for k in a)


@pytest.mark.parametrize("objective", [kind() for kind in SETTINGS.values()], ids=lambda o: o.name)
def test_loss_metrics_and_gradient_do_not_depend_on_micro_batches_order_or_ranks(
    objective: Any, model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    samples = samples_of(9)
    if objective.name == "supervised":
        samples = [replace(s, loss_mask=s.loss_mask * 0.3 + 0.2) for s in samples]
    results = []
    cases = [(4096, range(9), 1), (60, range(9), 1), (1, range(8, -1, -1), 1), (60, range(9), 3)]
    for budget, order, ranks in cases:
        config = TrainerConfig(
            objective=objective, tokens_per_micro_batch=budget, learning_rate=1e-3, warmup_steps=0,
            ranks=ranks,
        )  # fmt: skip
        shares = divide([samples[i] for i in order], config)
        # One rank does what all would: their losses and gradients are added up.
        of_all = MiniBatchShare(
            [micro for (mini,) in shares for micro in mini.micro_batches],
            [scales for (mini,) in shares for scales in mini.scales],
        )
        with started(model, tmp_path, config) as rank:
            gradients = gradients_of(rank)
            results.append((rank.step([of_all], 0), gradients))
    for metrics, gradients in results[1:]:
        assert close(results[0][0], metrics), (results[0][0], metrics)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, results[0][1][name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("aggregation", [a for a in get_args(Aggregation) if a])
def test_a_batch_in_parts_makes_the_step_that_it_makes_at_once(
    aggregation: Aggregation, model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    length = 40 if aggregation == "fixed_length" else None
    config = TrainerConfig(
        learning_rate=1e-3, warmup_steps=0, tokens_per_micro_batch=64, aggregation=aggregation,
        fixed_length=length,
    )  # fmt: skip
    samples = samples_of(9)
    told, gradients = [], []
    for parts in ([samples], [samples[:2], samples[2:7], samples[7:]]):
        with started(model, tmp_path, config) as rank:
            gradients.append(gradients_of(rank))
            if len(parts) == 1:
                told.append(rank.step(divide(samples, config)[0], 0))
            else:
                rank.add(divide(samples[:4], config, part=True)[0][0], 0, True)  # forgotten
                for number, part in enumerate(parts):
                    rank.add(divide(part, config, part=True)[0][0], 0, number == 0)
                told.append(rank.finish(sum(denominator_of(part, config) for part in parts)))
    whole, in_parts = told
    assert in_parts == pytest.approx(whole, rel=1e-5, abs=1e-7)
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() < 1e-6, name


def test_the_loss_and_the_gap_are_those_of_an_independent_reference(
    model: Path, tmp_path: Path, samples_of: SamplesOf, reference_logprobs: Reference
) -> None:
    version, config = 3, TrainerConfig()
    samples = samples_of(6, version=version)
    plain = Model.from_pretrained(model)
    losses, weights, gaps = [], [], []
    for sample in samples:
        now = np.array([0.0, *reference_logprobs(plain, sample.token_ids.tolist())])
        weight = np.minimum(np.exp(now - sample.logprobs), 2.0)
        trained = sample.loss_mask > 0
        losses += list((-weight * sample.advantage)[trained])
        weights += list(weight[trained])
        gaps += list(np.abs(now - sample.logprobs)[trained & (sample.versions == version)])
    with started(model, tmp_path, config) as rank:
        metrics = step(rank, samples, config, version)
    assert metrics["loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert metrics["weight/mean"] == pytest.approx(np.mean(weights), abs=1e-5)
    assert metrics["ratio/mean"] == 1.0
    assert metrics["kl_behaviour"] >= 0
    # Tokens of version 2 are in the batch, and their gap is greater; it is not a fault.
    assert metrics["logprob_gap/max"] == pytest.approx(max(gaps), abs=1e-4)


def test_without_a_token_of_the_present_version_there_is_no_gap(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    config = TrainerConfig()
    with started(model, tmp_path, config) as rank:
        assert "logprob_gap/max" not in step(rank, samples_of(3, version=0), config, version=7)


def test_a_supervised_step_weighs_tokens_by_the_mask_and_leaves_the_first_out(
    model: Path, tmp_path: Path, reference_logprobs: Reference
) -> None:
    sample = fake_sample([5, 6, 7, 8], [9.0, 0.5, 0.0, 1.0])
    config = TrainerConfig(objective=Supervised())
    with started(model, tmp_path, config) as rank:
        metrics = step(rank, [sample], config)
    now = reference_logprobs(Model.from_pretrained(model), [5, 6, 7, 8])
    assert metrics["loss"] == pytest.approx(-(0.5 * now[0] + now[2]) / 1.5, abs=1e-5)


def test_the_proximal_policy_of_all_mini_batches_is_that_of_the_start_of_the_step(
    model: Path, tmp_path: Path, samples_of: SamplesOf, reference_logprobs: Reference
) -> None:
    samples = samples_of(4)
    config = TrainerConfig(mini_batches=2, learning_rate=0.05, warmup_steps=0)
    with started(model, tmp_path, config) as rank:
        before = {s.episode: rank.score([s.token_ids.tolist()]).logprobs[0] for s in samples}
        # The first mini-batch alone gives the weights that the second one meets.
        alone = TrainerConfig(learning_rate=0.05, warmup_steps=0)
        step(rank, samples[0::2], alone)
        between = {s.episode: rank.score([s.token_ids.tolist()]).logprobs[0] for s in samples}
    with started(model, tmp_path, config) as rank:
        metrics = step(rank, samples, config)
    ratios = []
    for number, sample in enumerate(samples):
        change = np.subtract(between[sample.episode], before[sample.episode])
        ratio = np.exp(change) if number % 2 else np.ones(len(change))
        ratios += list(ratio[sample.loss_mask[1:] > 0])
    assert abs(np.mean(ratios) - 1) > 0.01
    assert metrics["ratio/mean"] == pytest.approx(np.mean(ratios), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_reloads_to_the_same_logprobs(
    kind: str,
    tied: bool,
    tmp_path: Path,
    save_model: SaveModel,
    samples_of: SamplesOf,
    reference_logprobs: Reference,
) -> None:
    model = save_model(tmp_path / "model", kind, tied=tied)
    config = TrainerConfig(learning_rate=1e-2, warmup_steps=0)
    probe = list(range(20))
    with started(model, tmp_path, config) as rank:
        untrained = rank.score([probe]).logprobs[0]
        step(rank, samples_of(5), config)
        score = rank.score([probe]).logprobs[0]
        rank.export(str(tmp_path / "exported"))
        rank.save_model(str(tmp_path / "saved"))
    assert np.abs(np.subtract(score, untrained)).max() > 0.01
    for folder in ("exported", "saved"):
        reloaded = Model.from_pretrained(tmp_path / folder)
        assert reference_logprobs(reloaded, probe) == pytest.approx(score, abs=1e-5)
        head, embeddings = reloaded.get_output_embeddings(), reloaded.get_input_embeddings()
        assert (head.weight is embeddings.weight) == tied


def test_a_resumed_run_equals_one_that_never_stopped_bit_for_bit(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    config = TrainerConfig(learning_rate=1e-2, warmup_steps=3, decay_steps=10, mini_batches=2)
    batches = [samples_of(6, seed=number) for number in range(5)]
    with started(model, tmp_path, config) as rank:
        for batch in batches[:2]:
            step(rank, batch, config)
        save(rank, tmp_path / "checkpoint", 2)
        expected = [step(rank, batch, config) for batch in batches[2:]]
        expected_weights = weights_of(rank)
    checkpoint = tmp_path / "checkpoint"
    with started(model, tmp_path, config, checkpoint) as rank:
        assert [step(rank, batch, config) for batch in batches[2:]] == expected
        for name, weight in weights_of(rank).items():
            assert torch.equal(weight, expected_weights[name]), name


def test_a_resumed_run_has_the_optimizer_settings_of_its_new_configuration(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    config = TrainerConfig(learning_rate=1e-2, warmup_steps=0)
    with started(model, tmp_path, config) as rank:
        step(rank, samples_of(2), config)
        save(rank, tmp_path / "checkpoint", 1)
    checkpoint = tmp_path / "checkpoint"
    resumed = TrainerConfig(
        learning_rate=1e-3, warmup_steps=0, decay_steps=10, weight_decay=0.5, betas=(0.8, 0.9)
    )
    with started(model, tmp_path, resumed, checkpoint) as rank:
        (before,) = [dict(group) for group in rank._optimizer.param_groups]
        moments = rank._optimizer.state[before["params"][0]]
        assert moments["exp_avg"].full_tensor().abs().sum() > 0, "what was gathered is kept"
        rate = step(rank, samples_of(2), resumed)["learning_rate"]
        (after,) = rank._optimizer.param_groups
    assert rate == pytest.approx(1e-3 * 0.9), "and where the schedule was"
    assert after["lr"] == rate
    for group in (before, after):
        assert (group["weight_decay"], group["betas"]) == (0.5, (0.8, 0.9))


def test_the_learning_rate_warms_up_then_decays(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    config = TrainerConfig(learning_rate=1.0, warmup_steps=2, decay_steps=2)
    with started(model, tmp_path, config) as rank:
        rates = [step(rank, samples_of(1), config)["learning_rate"] for _ in range(6)]
    assert rates == [0.5, 1.0, 1.0, 0.5, 0.0, 0.0]


def test_the_gradient_is_clipped_and_its_norm_reported_unclipped(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    norms = []
    for most in (1e-3, 1e3):
        config = TrainerConfig(max_grad_norm=most)
        with started(model, tmp_path, config) as rank:
            norms.append(step(rank, samples_of(3), config)["grad_norm"])
    assert norms[0] == norms[1] > 1e-3
    assert math.isfinite(norms[0])


def test_gradient_checkpointing_changes_nothing(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    results = []
    for checkpointing in (False, True):
        config = TrainerConfig(gradient_checkpointing=checkpointing)
        with started(model, tmp_path, config) as rank:
            results.append(step(rank, samples_of(4), config))
    assert close(*results)


def save_noisy_model(folder: Path, kind: str) -> Path:
    """A model whose layers have dropout, or jitter in their routers, while they train."""
    settings: dict[str, Any] = {
        "opt": {
            "dropout": 0.5, "attention_dropout": 0.5, "ffn_dim": 64, "word_embed_proj_dim": 32,
            "init_std": 0.3,
        },
        "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
        "mixtral": {
            "router_jitter_noise": 0.5, "attention_dropout": 0.5, "num_local_experts": 4,
            "intermediate_size": 32, "num_key_value_heads": 2,
        },
    }[kind]  # fmt: skip
    config = AutoConfig.for_model(
        kind, vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        Model.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["opt", "gpt2", "mixtral"])
def test_no_forward_of_the_trainer_has_dropout_or_jitter(
    kind: str, tmp_path: Path, samples_of: SamplesOf, reference_logprobs: Reference
) -> None:
    noisy = save_noisy_model(tmp_path / "noisy", kind)
    results, gradients = [], []
    for checkpointing in (False, True):
        config = TrainerConfig(gradient_checkpointing=checkpointing, warmup_steps=0)
        with started(noisy, tmp_path, config) as rank:
            gradients.append(gradients_of(rank))
            expected = reference_logprobs(Model.from_pretrained(noisy), list(range(30)))
            assert rank.score([range(30)]).logprobs[0] == pytest.approx(expected, abs=1e-4)
            results.append(step(rank, samples_of(4), config))
    assert close(*results)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("tokens_per_micro_batch", [None, 16])
def test_sequences_are_scored_together_as_each_is_alone(
    tokens_per_micro_batch: int | None, model: Path, tmp_path: Path, reference_logprobs: Reference
) -> None:
    config = TrainerConfig(tokens_per_micro_batch=tokens_per_micro_batch)
    sequences = [range(start, start + length) for start, length in enumerate([5, 9, 2, 20, 3])]
    with started(model, tmp_path, config) as rank:
        scored = rank.score(sequences).logprobs
    reference = Model.from_pretrained(model)
    for sequence, logprobs in zip(sequences, scored, strict=True):
        assert logprobs == pytest.approx(reference_logprobs(reference, list(sequence)), abs=1e-5)


def test_activations_are_computed_again_in_the_backward_pass(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    calls: list[int] = []
    for checkpointing in (False, True):
        config = TrainerConfig(gradient_checkpointing=checkpointing)
        with started(model, tmp_path, config) as rank:
            mlp = rank._model.model.layers[0].mlp
            mlp.register_forward_pre_hook(lambda *_: calls.append(checkpointing))  # noqa: B023
            step(rank, samples_of(1), config)
    assert (calls.count(False), calls.count(True)) == (1, 2)


@pytest.mark.parametrize("way", ["one unit", "layers are units", "in chunks", "recomputed"])
def test_a_temperature_is_exact_where_layers_compute_in_bfloat16(
    way: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.7 in bfloat16 is 0.6992, which moves a logprob of -8 by 0.01."""
    if way == "layers are units":
        monkeypatch.setattr("flash.trainer.sharding._ONE_UNIT_PARAMETERS", 0)
    config = TrainerConfig(dtype="bfloat16", gradient_checkpointing=way == "recomputed")
    token_ids, scored_T = torch.arange(20), torch.arange(1, 20)
    half = Model.from_pretrained(model, dtype=torch.bfloat16)
    logits_TV = half(token_ids[None]).logits[0, :-1].detach().double() / 0.7
    expected_T = logits_TV.log_softmax(-1).gather(-1, token_ids[1:, None])[:, 0]
    with started(model, tmp_path, config) as rank, torch.no_grad():
        if way == "in chunks":
            rank._scorer._chunk = 4
        found_T = rank._scorer(
            token_ids, (20,), scored_T, temperatures_T=torch.full((19,), 0.7)
        ).double()
        rounded_T = rank._scorer(
            token_ids, (20,), scored_T, temperatures_T=torch.full((19,), 0.69921875)
        ).double()
    # Kernels of attention differ in bfloat16, a rounded temperature differs everywhere.
    assert (found_T - expected_T).mean().abs() < (rounded_T - expected_T).mean().abs()
    assert (found_T - rounded_T).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
def test_units_of_layers_round_nothing_in_bfloat16_that_one_unit_does_not(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP casts what its units are given, but for the outermost; so what a layer is given besides
    activations must be what a model in bfloat16 gives it itself."""
    config = AutoConfig.for_model(
        kind, vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=256,
        initializer_range=0.3, sliding_window=16, bos_token_id=None, eos_token_id=1,
        layer_types=["full_attention", "sliding_attention"] if kind == "gemma3_text" else None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        Model.from_config(config).save_pretrained(tmp_path / "model")
    found = []
    for parameters in (10**9, 0):
        monkeypatch.setattr("flash.trainer.sharding._ONE_UNIT_PARAMETERS", parameters)
        with started(tmp_path / "model", tmp_path, TrainerConfig(dtype="bfloat16")) as rank:
            layer = rank._model.base_model.layers[0]
            assert isinstance(layer, FSDPModule) == (not parameters)
            found.append(rank.score([range(40), range(50, 90)]))
    assert found[0] == found[1]


def test_a_model_that_can_not_be_trained_is_told_in_a_line(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, initializer_range=0.3,
    )  # fmt: skip
    Model.from_config(config).save_pretrained(tmp_path / "bert")
    rank = Rank()
    why = rank.start(str(tmp_path / "bert"), None, TrainerConfig(), 0, 1, None, 0)
    dist.destroy_process_group()
    assert why.startswith("model_type='bert' computes other logprobs in packed sequences")
    assert "\n" not in why


# ── objectives, in the whole ─────────────────────────────────────────────────────────────────


def scored(model: Path, samples: list[Sample], reference_logprobs: Reference) -> list[Any]:
    """The logprobs of each sample's trained tokens under a model, in float64."""
    plain = Model.from_pretrained(model)
    return [
        np.array([0.0, *reference_logprobs(plain, s.token_ids.tolist())])[s.loss_mask > 0]
        for s in samples
    ]


def played(samples: Literal["whole", "turns"]) -> list[Sample]:
    """Two groups of four episodes with advantages, in the words of the model."""

    async def play() -> Batch:
        envs = FakeEnvs(seed=1, turns=(1, 4))
        async with (
            InferenceHub([FakeWorker("w", seed=3)]) as hub,
            RolloutLoop(
                hub,
                agent=lambda: EnvironmentAgent(
                    envs=envs, style=FakeStyle(), max_tokens=4, samples=samples
                ),
                tasks=[Task(0), Task(1)], batch_size=8, group_size=4, alpha=0,
            ) as rollouts,
        ):  # fmt: skip
            return await rollouts.next_batch()

    batch = virtual_time.run(play())
    return [replace(sample, token_ids=sample.token_ids % 97) for sample in batch.samples]


def test_a_sample_for_each_turn_trains_what_whole_trajectories_do(
    model: Path, tmp_path: Path
) -> None:
    # Of all ways to add up only this one asks neither where a sample ends nor how many there are.
    config = TrainerConfig(aggregation="token_mean", learning_rate=1e-3, warmup_steps=0)
    told, gradients = [], []
    for samples in (played("whole"), played("turns")):
        with started(model, tmp_path, config) as rank:
            gradients.append(gradients_of(rank))
            told.append(step(rank, samples, config))
    whole, turns = told
    assert close(whole, turns), (whole, turns)
    assert whole["grad_norm"] > 0.1
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=0)


@pytest.mark.parametrize("aggregation", get_args(Aggregation))
def test_the_loss_is_added_up_as_the_aggregation_says(
    aggregation: Any,
    model: Path,
    tmp_path: Path,
    samples_of: SamplesOf,
    reference_logprobs: Reference,
) -> None:
    samples = samples_of(5)
    config = TrainerConfig(
        objective=Vanilla(),
        aggregation=aggregation,
        fixed_length=32 if aggregation == "fixed_length" else None,
        tokens_per_micro_batch=40,
    )
    logprobs = scored(model, samples, reference_logprobs)
    losses = [-s.advantage * now for s, now in zip(samples, logprobs, strict=True)]
    expected = {
        "token_mean": np.concatenate(losses).mean(),
        "sequence_mean": np.mean([loss.mean() for loss in losses]),
        "sequence_sum": np.mean([loss.sum() for loss in losses]),
        "fixed_length": np.mean([loss.sum() / 32 for loss in losses]),
    }
    with started(model, tmp_path, config) as rank:
        assert step(rank, samples, config)["loss"] == pytest.approx(expected[aggregation], rel=1e-5)


def test_the_divergence_from_a_reference_is_added_to_the_loss_or_taken_from_the_returns(
    model: Path,
    save_model: SaveModel,
    tmp_path: Path,
    samples_of: SamplesOf,
    reference_logprobs: Reference,
) -> None:
    samples = samples_of(4)
    other = save_model(tmp_path / "other", "llama", tied=False)
    now = scored(model, samples, reference_logprobs)
    x = [a - b for a, b in zip(now, scored(other, samples, reference_logprobs), strict=True)]
    k3 = [np.exp(-of_one) - 1 + of_one for of_one in x]
    behaviour = [s.logprobs[s.loss_mask > 0] for s in samples]
    ratios = [np.exp(a - b) for a, b in zip(now, behaviour, strict=True)]
    to_go = [of_one[::-1].cumsum()[::-1] for of_one in x]
    expected = {
        ("loss", True): [r * k for r, k in zip(ratios, k3, strict=True)],
        ("loss", False): k3,
        ("reward", True): [penalty * a for penalty, a in zip(to_go, now, strict=True)],
    }
    plain = [-s.advantage * a for s, a in zip(samples, now, strict=True)]
    for (place, corrected), added in expected.items():
        kl = KlSettings(
            coefficient=0.3,
            place=place,  # type: ignore[arg-type]
            estimator="k1" if place == "reward" else "k3",
            corrected=corrected,
        )
        config = TrainerConfig(objective=Vanilla(), kl=kl, tokens_per_micro_batch=40)
        with started(model, tmp_path, config, reference=other) as rank:
            metrics = step(rank, samples, config)
        loss = np.concatenate(plain).mean() + 0.3 * np.concatenate(added).mean()
        assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
        assert metrics["kl_reference"] == pytest.approx(np.concatenate(k3).mean(), rel=1e-4)


def test_the_penalties_of_a_whitened_return_are_told_and_not_taken_a_second_time(
    model: Path,
    save_model: SaveModel,
    tmp_path: Path,
    samples_of: SamplesOf,
    reference_logprobs: Reference,
) -> None:
    samples = samples_of(3)
    other = save_model(tmp_path / "other", "llama", tied=False)
    now = scored(model, samples, reference_logprobs)
    far = scored(other, samples, reference_logprobs)
    to_go = [(a - b)[::-1].cumsum()[::-1] for a, b in zip(now, far, strict=True)]
    kl = KlSettings(coefficient=0.3, place="reward", estimator="k1")
    config = TrainerConfig(objective=Vanilla(), kl=kl, advantages=ReinforcePp())
    with started(model, tmp_path, config, reference=other) as rank:
        (penalties,) = rank.penalties([samples])
        loss = step(rank, samples, config)["loss"]
    for found, expected in zip(penalties, to_go, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    plain = [-s.advantage * a for s, a in zip(samples, now, strict=True)]
    assert loss == pytest.approx(np.concatenate(plain).mean(), rel=1e-4)


def test_the_reference_does_not_learn(model: Path, tmp_path: Path, samples_of: SamplesOf) -> None:
    config = TrainerConfig(kl=KlSettings(coefficient=0.1), learning_rate=0.01, warmup_steps=0)
    with started(model, tmp_path, config, reference=model) as rank:
        divergences = [step(rank, samples_of(4), config)["kl_reference"] for _ in range(3)]
    assert divergences[0] == pytest.approx(0, abs=1e-9)
    assert 1e-4 < divergences[1] < divergences[2]


def test_an_entropy_bonus_is_taken_from_the_loss_and_raises_entropy(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    samples = [replace(s, advantage=0.0) for s in samples_of(4)]
    config = TrainerConfig(entropy_bonus=0.5, learning_rate=0.01, warmup_steps=0)
    with started(model, tmp_path, config) as rank:
        first, second = (step(rank, samples, config) for _ in range(2))
    assert first["loss"] == pytest.approx(-0.5 * first["entropy"])
    assert second["entropy"] > first["entropy"] + 0.01


def test_each_token_is_compared_at_the_temperature_it_was_sampled_at(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    plain = Model.from_pretrained(model)
    rng = np.random.default_rng(3)
    samples = []
    for sample in samples_of(4):
        warm = rng.choice([0.5, 1.0, 2.0], sample.num_tokens).astype(np.float32)
        temperatures = np.where(sample.loss_mask > 0, warm, np.float32(1))
        with torch.no_grad():
            logits = plain(torch.tensor(sample.token_ids)[None]).logits[0, :-1].double()
        chosen = (logits / torch.tensor(temperatures[1:, None])).log_softmax(-1)[
            range(len(logits)), sample.token_ids[1:].tolist()
        ]
        logprobs = np.concatenate([[0], chosen.numpy()]).astype(np.float32) * sample.loss_mask
        samples.append(replace(sample, temperatures=temperatures, logprobs=logprobs))
    config = TrainerConfig(objective=Tis())
    with started(model, tmp_path, config) as rank:
        metrics = step(rank, samples, config)
    assert metrics["kl_behaviour"] == pytest.approx(0, abs=1e-8)
    assert metrics["weight/p01"] == pytest.approx(1, abs=1e-4)
    assert metrics["logprob_gap/max"] < 1e-4


def test_an_advantage_of_each_token_is_used_by_each_token(
    model: Path, tmp_path: Path, samples_of: SamplesOf, reference_logprobs: Reference
) -> None:
    samples = [
        replace(s, advantage=np.linspace(-1, 2, s.num_tokens, dtype=np.float32))
        for s in samples_of(3)
    ]
    samples.append(samples_of(1, seed=5)[0])
    now = scored(model, samples, reference_logprobs)
    losses = []
    for sample, logprobs in zip(samples, now, strict=True):
        of_tokens = np.broadcast_to(sample.advantage, sample.num_tokens)
        losses += list(-of_tokens[sample.loss_mask > 0] * logprobs)
    config = TrainerConfig(objective=Vanilla())
    with started(model, tmp_path, config) as rank:
        assert step(rank, samples, config)["loss"] == pytest.approx(np.mean(losses), rel=1e-5)


def test_what_a_step_tells_of_its_weights_is_that_of_numpy(
    model: Path, tmp_path: Path, samples_of: SamplesOf, reference_logprobs: Reference
) -> None:
    samples, version = samples_of(8, version=3), 3
    config = TrainerConfig(objective=Tis(cap=1.5), tokens_per_micro_batch=60)
    now = np.concatenate(scored(model, samples, reference_logprobs))
    behaviour = np.concatenate([s.logprobs[s.loss_mask > 0] for s in samples])
    fresh = np.concatenate([s.versions[s.loss_mask > 0] for s in samples]) == version
    ratios = np.exp(now - behaviour)
    weights = np.minimum(ratios, 1.5)
    kl = ratios - 1 - np.log(ratios)
    with started(model, tmp_path, config) as rank:
        metrics = step(rank, samples, config, version)
    expected = {
        "importance/mean": ratios.mean(),
        "importance/ess": ratios.sum() ** 2 / (ratios**2).sum() / len(ratios),
        "weight/mean": weights.mean(),
        "weight/ess": weights.sum() ** 2 / (weights**2).sum() / len(weights),
        "weight/p01": np.percentile(weights, 1),
        "weight/p50": np.percentile(weights, 50),
        "weight/p99": np.percentile(weights, 99),
        "weight/capped_fraction": (ratios > 1.5).mean(),
        "ratio/clip_fraction": 0,
        "kl_behaviour": kl.mean(),
        "mismatch/kl_fresh": kl[fresh].mean(),
        "mismatch/kl_stale": kl[~fresh].mean(),
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)


def test_an_objective_without_proximal_logprobs_compares_what_its_first_mini_batch_tells(
    model: Path, tmp_path: Path, samples_of: SamplesOf
) -> None:
    samples = samples_of(6)
    metrics = []
    for objective, chosen in ((Tis(), samples), (DecoupledPpo(), samples[0::2])):
        mini_batches = 2 if isinstance(objective, Tis) else 1
        config = TrainerConfig(objective=objective, mini_batches=mini_batches)
        with started(model, tmp_path, config) as rank:
            metrics.append(step(rank, chosen, config))
    for name in ("mismatch/kl_fresh", "mismatch/kl_stale", "logprob_gap/max"):
        assert metrics[0][name] == pytest.approx(metrics[1][name])


def test_ranks_keep_to_the_interface_with_their_nodes_address(monkeypatch) -> None:
    name, address = next(
        (name, one.address)
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if "." in one.address and not one.address.startswith("127.")
    )
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(variable, "")  # so that it is again afterwards as it was before
        monkeypatch.delenv(variable)
    _keep_to(address)
    assert os.environ["GLOO_SOCKET_IFNAME"] == name
    assert os.environ["NCCL_SOCKET_IFNAME"] == f"={name}"
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib")
    _keep_to(address)
    assert os.environ["NCCL_SOCKET_IFNAME"] == "ib", "whoever starts Ray on a node may know better"
    with pytest.raises(RuntimeError, match="no network interface of .* has the address 192.0.2.77"):
        _keep_to("192.0.2.77")
