"""What an expert wrote, imitated beside the policy's own samples: (1 - μ)·own + μ·(-log π)."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from flash.trainer.advantage_settings import Gae
from flash.trainer.config import CriticConfig, TrainerConfig
from flash.trainer.objectives.aggregation import denominator
from flash.trainer.objectives.settings import SETTINGS, Aggregation, KlSettings
from flash.trainer.packing import MiniBatchShare, denominator_of, divide, divide_expert
from flash.trainer.rank import Rank
from flash.trainer.trainer import Trainer
from flash.types import Batch, ExpertSequence, ExpertShare, Sample

SamplesOf = Callable[..., list[Sample]]
SaveModel = Callable[..., Path]
Gradients = dict[str, torch.Tensor]

WEIGHT = 0.3
# The gradient is compared as it is: neither clipped nor, by a second one of the same norm, scaled.
CONFIG = TrainerConfig(learning_rate=1e-3, warmup_steps=0, threads=1, max_grad_norm=1e9)


@pytest.fixture
def model(save_model: SaveModel, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


@pytest.fixture
def expert(samples_of: SamplesOf) -> list[Sample]:
    """Of unequal lengths, and one with tokens of an unequal weight."""
    written = [
        Sample.supervised(s.token_ids, s.loss_mask, episode=0) for s in samples_of(4, seed=9)
    ]
    return [replace(written[0], loss_mask=written[0].loss_mask * 0.5), *written[1:]]


def share_of(samples: list[Sample], weight: float = WEIGHT) -> ExpertShare:
    sequences = [
        ExpertSequence(token_ids=s.token_ids, loss_mask=s.loss_mask, source=f"e.jsonl:{number}")
        for number, s in enumerate(samples)
    ]
    return ExpertShare(sequences=sequences, weight=weight)


@contextlib.contextmanager
def started(model: Path, tmp_path: Path, config: TrainerConfig) -> Iterator[tuple[Rank, Gradients]]:
    """A rank, and the gradient of its next optimizer step."""
    rank, gradients = Rank(), {}

    def keep(*_: Any) -> None:
        for name, parameter in rank._scorer.named_parameters():
            whole = parameter.grad.full_tensor()  # type: ignore[union-attr]
            gradients[name.removeprefix("model.")] = whole.clone()

    reference = str(model) if config.kl.coefficient else None
    assert not rank.start(str(model), None, config, 0, 1, None, 0, reference)
    try:
        rank._optimizer.register_step_pre_hook(keep)
        yield rank, gradients
    finally:
        dist.destroy_process_group()


def of_all_ranks(shares: list[list[MiniBatchShare]]) -> list[MiniBatchShare]:
    """One rank does what all would: their losses and gradients are added up."""
    return [
        MiniBatchShare(
            [micro for mini in minis for micro in mini.micro_batches],
            [scales for mini in minis for scales in mini.scales],
            minis[0].weight,
        )
        for minis in zip(*shares, strict=True)
    ]


def trained(
    model: Path, tmp_path: Path, config: TrainerConfig, own: list[Sample], expert: list[Sample]
) -> tuple[dict[str, float], Gradients]:
    shares = of_all_ranks(divide(own, config))
    imitated = divide_expert(expert, WEIGHT, config, mini_batches=len(shares)) if expert else []
    with started(model, tmp_path, config) as (rank, gradients):
        return rank.step(shares, 0, of_all_ranks(imitated)), gradients


def imitation_by_hand(
    model: Path, expert: list[Sample], aggregation: Aggregation, fixed_length: int | None = None
) -> tuple[float, Gradients]:
    """The loss and its gradient, from plain forward passes of transformers."""
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    losses = []
    for sample in expert:
        token_ids = torch.tensor(sample.token_ids)[None]
        logprobs_S = network(token_ids).logits[0, :-1].log_softmax(-1)
        nll_S = -logprobs_S.gather(-1, token_ids[0, 1:, None])[:, 0]
        mask_S = torch.tensor(sample.loss_mask[1:])
        divisor = {"sequence_mean": float(mask_S.sum()), "fixed_length": fixed_length}
        losses.append((nll_S * mask_S).sum() / (divisor.get(str(aggregation)) or 1))
    loss = torch.stack(losses).sum() / denominator(expert, aggregation)
    loss.backward()
    return float(loss.detach()), {
        name: parameter.grad for name, parameter in network.named_parameters()
    }


def assert_mixed(mixed: Gradients, own: Gradients, imitated: Gradients) -> None:
    assert mixed.keys() == own.keys() and len(mixed) > 10
    for name, gradient in mixed.items():
        wanted = (1 - WEIGHT) * own[name] + WEIGHT * imitated[name]
        torch.testing.assert_close(gradient, wanted, atol=2e-6, rtol=1e-4)
        assert (gradient - own[name]).abs().max() > 1e-4, name


@pytest.mark.parametrize("objective", [kind() for kind in SETTINGS.values()], ids=lambda o: o.name)
def test_the_gradient_is_the_own_one_and_the_imitations_by_their_weights(
    objective: Any, model: Path, tmp_path: Path, samples_of: SamplesOf, expert: list[Sample]
) -> None:
    own = samples_of(9)
    for budget, ranks in ((4096, 1), (60, 3)):
        config = CONFIG.model_copy(
            update={
                "objective": objective, "ranks": ranks, "tokens_per_micro_batch": budget,
                "entropy_bonus": 0.01, "kl": KlSettings(coefficient=0.1, place="loss"),
            }
        )  # fmt: skip
        loss, imitated = imitation_by_hand(model, expert, objective.aggregation)
        alone, of_own = trained(model, tmp_path, config, own, [])
        metrics, gradients = trained(model, tmp_path, config, own, expert)
        assert_mixed(gradients, of_own, imitated)
        assert metrics.pop("expert/loss") == pytest.approx(loss, rel=1e-5)
        # All else is of the policy's own tokens, as if the expert's were not there.
        del metrics["grad_norm"], alone["grad_norm"]
        assert metrics == alone


@pytest.mark.parametrize("aggregation", [a for a in get_args(Aggregation) if a])
def test_an_experts_tokens_are_added_up_as_the_policys_own(
    aggregation: Aggregation,
    model: Path,
    tmp_path: Path,
    samples_of: SamplesOf,
    expert: list[Sample],
) -> None:
    length = 40 if aggregation == "fixed_length" else None
    config = CONFIG.model_copy(
        update={"aggregation": aggregation, "fixed_length": length, "tokens_per_micro_batch": 64}
    )
    own = samples_of(9)
    loss, imitated = imitation_by_hand(model, expert, aggregation, length)
    _, of_own = trained(model, tmp_path, config, own, [])
    metrics, at_once = trained(model, tmp_path, config, own, expert)
    assert metrics["expert/loss"] == pytest.approx(loss, rel=1e-5)
    assert_mixed(at_once, of_own, imitated)
    with started(model, tmp_path, config) as (rank, in_parts):
        parts = [own[:2], own[2:]]
        for number, part in enumerate(parts):
            rank.add(divide(part, config, part=True)[0][0], 0, number == 0)
        ((of_expert,),) = divide_expert(expert, WEIGHT, config, mini_batches=1)
        told = rank.finish(sum(denominator_of(part, config) for part in parts), of_expert)
    assert told == pytest.approx(metrics, rel=1e-5, abs=1e-7)
    assert_mixed(in_parts, of_own, imitated)


def test_each_optimizer_step_has_some_of_the_experts_and_one_without_is_the_policys_alone(
    samples_of: SamplesOf, expert: list[Sample]
) -> None:
    config = CONFIG.model_copy(update={"mini_batches": 3, "ranks": 2})
    for count, weights in ((4, [WEIGHT] * 3), (2, [WEIGHT, WEIGHT, 0.0])):
        shares = divide_expert(expert[:count], WEIGHT, config, mini_batches=3)
        assert [[mini.weight for mini in share] for share in shares] == [weights, weights]
        minis = of_all_ranks(shares)
        found = [sample for mini in minis for micro in mini.micro_batches for sample in micro]
        assert len(found) == count
        for mini in minis:
            masses = [
                scale * sample.loss_mask[1:].sum()
                for micro, scales in zip(mini.micro_batches, mini.scales, strict=True)
                for sample, scale in zip(micro, scales, strict=True)
            ]
            assert sum(masses) == pytest.approx(1.0 if mini.weight else 0.0)


@pytest.mark.slow
async def test_two_ranks_imitate_as_one_does_and_the_critic_learns_nothing_of_it(
    tmp_path: Path, model: Path, samples_of: SamplesOf, expert: list[Sample]
) -> None:
    unread = replace(expert[0], loss_mask=0 * expert[0].loss_mask)  # has nothing to learn
    given = Batch(samples=samples_of(7), version=0, expert=share_of([*expert, unread]))
    told, scores = {}, {}
    settings = CONFIG.model_copy(
        update={
            "advantages": Gae(),
            "mini_batches": 2,
            "critic": CriticConfig(learning_rate=1e-2),
            "aggregation": "sequence_mean",
        }
    )
    for case, ranks, batch in (
        ("one", 1, given),
        ("two", 2, given),
        ("none", 1, replace(given, expert=None)),
    ):
        config = settings.model_copy(update={"ranks": ranks, "tokens_per_micro_batch": 50})
        async with Trainer(model=model, config=config, run_dir=tmp_path / case) as trainer:
            told[case] = await trainer.step(batch)
            scores[case] = (await trainer.score([range(20)])).logprobs[0]
        del told[case]["time/train_s"]
    assert told["two"] == pytest.approx(told["one"], rel=1e-5, abs=1e-7)
    assert scores["two"] == pytest.approx(scores["one"], rel=1e-5)
    assert max(abs(np.subtract(scores["one"], scores["none"]))) > 1e-3
    tokens = sum((sample.loss_mask[1:] > 0).sum() for sample in expert)
    assert told["one"]["expert/tokens"] == tokens
    assert not any(name.startswith("expert/") for name in told["none"])
    for name in ("critic/loss", "critic/value_mean", "critic/return_mean", "tokens/trained"):
        assert told["one"][name] == told["none"][name], name


@pytest.mark.slow
async def test_two_ranks_imitate_beside_a_batch_in_parts_as_one_beside_a_whole_one(
    tmp_path: Path, model: Path, samples_of: SamplesOf, expert: list[Sample]
) -> None:
    own, told, scores = samples_of(7), [], []
    for ranks, cuts in ((1, [own]), (2, [own[:1], own[1:4], own[4:]])):
        config = CONFIG.model_copy(update={"ranks": ranks, "tokens_per_micro_batch": 50})
        parts = [Batch(samples=cut, version=0, last=cut is cuts[-1]) for cut in cuts]
        parts[-1] = replace(parts[-1], expert=share_of(expert))
        async with Trainer(model=model, config=config, run_dir=tmp_path / f"{ranks}") as trainer:
            for part in parts[:-1]:
                await trainer.add(part)
            told.append(await trainer.step(parts[-1]))
            scores.append((await trainer.score([range(20)])).logprobs[0])
        del told[-1]["time/train_s"]
    assert told[1] == pytest.approx(told[0], rel=1e-5, abs=1e-7)
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)


async def test_what_can_not_be_imitated_is_named(
    tmp_path: Path, samples_of: SamplesOf, expert: list[Sample]
) -> None:
    trainer = Trainer(model="none", config=CONFIG, run_dir=tmp_path)
    given = Batch(samples=samples_of(2), version=0)
    for weight in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"weight is {weight:g}: it must be at least 0 and"):
            await trainer.step(replace(given, expert=share_of(expert, weight)))
    share = share_of([expert[0], replace(expert[1], loss_mask=-expert[1].loss_mask)])
    with pytest.raises(ValueError, match=r"e\.jsonl:1: the loss mask must be finite"):
        await trainer.step(replace(given, expert=share))
    nameless = replace(share.sequences[1], source="")
    share = ExpertShare(sequences=[share.sequences[0], nameless], weight=WEIGHT)
    with pytest.raises(ValueError, match="sequence 1 of the expert's: the loss mask must be"):
        await trainer.step(replace(given, expert=share))
    with pytest.raises(ValueError, match="comes with its last part"):
        await trainer.add(replace(given, last=False, expert=share_of(expert)))
