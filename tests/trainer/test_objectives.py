"""Each objective against values worked by hand, and against its definition in plain float64."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.trainer.objectives.choose import OBJECTIVES, make_objective
from flash.trainer.objectives.settings import (
    SETTINGS,
    DecoupledPpo,
    Function,
    Gspo,
    IcePop,
    Kimi15,
    MaskedIs,
    ObjectiveSettings,
    Opmd,
    Ppo,
    Supervised,
    Tis,
    Topr,
    Vanilla,
)
from flash.trainer.objectives.token_batch import TokenBatch, TokenLoss

log, exp = np.log, np.exp


@dataclass
class Sequence:
    """One sequence: log-probabilities and ages of its tokens, its advantage and reward."""

    now: Any
    prox: Any
    behaviour: Any
    advantage: float = 1.0
    reward: float = 0.0
    ages: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.now)


def batch_of(*sequences: Sequence, progress: float = 0.0) -> TokenBatch:
    def tokens(values: list[Any]) -> torch.Tensor:
        return torch.tensor(np.concatenate(values), dtype=torch.float64)

    numbers = [np.full(len(s), i) for i, s in enumerate(sequences)]
    return TokenBatch(
        logprobs_T=tokens([s.now for s in sequences]).requires_grad_(),
        proximal_logprobs_T=tokens([s.prox for s in sequences]),
        behaviour_logprobs_T=tokens([s.behaviour for s in sequences]),
        advantages_T=tokens([np.full(len(s), s.advantage) for s in sequences]),
        rewards_T=tokens([np.full(len(s), s.reward) for s in sequences]),
        ages_T=tokens([s.ages or [0] * len(s) for s in sequences]).long(),
        sequences_T=torch.tensor(np.concatenate(numbers)),
        num_sequences=len(sequences),
        progress=progress,
    )


def evaluate(batch: TokenBatch, objective: ObjectiveSettings) -> tuple[TokenLoss, list[float]]:
    """The loss, and the gradient of its sum."""
    loss = make_objective(objective)(batch)
    loss.loss_T.sum().backward()
    assert batch.logprobs_T.grad is not None
    return loss, batch.logprobs_T.grad.tolist()


def random_sequences(seed: int, spread: float = 1.0) -> list[Sequence]:
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(rng.integers(1, 5)):
        length = int(rng.integers(1, 7))
        behaviour = rng.uniform(-4, -0.5, length)
        prox = behaviour + spread * rng.normal(size=length)
        sequences.append(
            Sequence(
                now=prox + spread * 0.3 * rng.normal(size=length),
                prox=prox,
                behaviour=behaviour,
                advantage=float(rng.normal()),
                reward=float(rng.integers(0, 2)),
                ages=[int(age) for age in rng.integers(0, 4, length)],
            )
        )
    return sequences


# ── by hand ──────────────────────────────────────────────────────────────────────────────────

# Ratios 1.5 and 0.5 (product 0.75) with A = 2; 3 with A = -1; 0.25 with A = -2.
# π_prox/π_behaviour 1.25, 0.625; 3; 0.25. π/π_prox 1.2, 0.8; 1; 1.
BY_HAND = [
    Sequence(log([0.6, 0.1]), log([0.5, 0.125]), log([0.4, 0.2]), advantage=2, reward=1),
    Sequence(log([0.3]), log([0.3]), log([0.1]), advantage=-1, reward=1),
    Sequence(log([0.1]), log([0.1]), log([0.4]), advantage=-2, reward=0),
]
ROOT = math.sqrt(0.75)


@pytest.mark.parametrize(
    ("objective", "weights"),
    [
        (Vanilla(), [1, 1, 1, 1]),
        (Opmd(tau=1), [0.5, 0.5, 0.5, 0.5]),
        (Tis(cap=2), [1.5, 0.5, 2, 0.25]),
        (SETTINGS["cispo"](), [1.28, 0.5, 1.28, 0.25]),
        (SETTINGS["cispo"](clip_low=0.2), [1.28, 0.8, 1.28, 0.8]),
        (Topr(), [1, 1, 1, 0.25]),
        (Topr(sign="reward"), [1, 1, 1, 0.25]),
        (MaskedIs(), [1.5, 0.5, 0, 0]),
        (MaskedIs(granularity="geometric", low=0.8), [1.5, 0.5, 0, 0]),
        (MaskedIs(granularity="sequence", high=3.5), [0.75, 0.75, 3, 0]),
        (Ppo(dual_clip=None), [0, 0.5, 3, 0]),
        (Ppo(dual_clip=2), [0, 0.5, 0, 0]),
        (DecoupledPpo(), [1.5, 0.5, 2, 0.25]),
        (DecoupledPpo(clip_high=0.1), [0, 0.5, 2, 0.25]),
        (IcePop(), [1.5, 0.5, 3, 0]),
        (Gspo(clip_low=0.2, clip_high=0.28), [ROOT, ROOT, 3, 0]),
    ],
    ids=lambda value: str(value.name) if isinstance(value, ObjectiveSettings) else "",
)
def test_the_weight_of_each_token_by_hand_and_its_gradient_is_minus_weight_times_advantage(
    objective: ObjectiveSettings, weights: list[float]
) -> None:
    loss, gradient = evaluate(batch_of(*BY_HAND), objective)
    assert loss.weight_T is not None
    assert loss.weight_T.tolist() == pytest.approx(weights)
    advantages = [2, 2, -1, -2]
    assert gradient == pytest.approx([-w * a for w, a in zip(weights, advantages, strict=True)])


@pytest.mark.parametrize(
    ("objective", "losses"),
    [
        (Vanilla(), [-2 * log(0.6), -2 * log(0.1), log(0.3), 2 * log(0.1)]),
        (Tis(cap=2), [-3 * log(0.6), -log(0.1), 2 * log(0.3), 0.5 * log(0.1)]),
        (Ppo(dual_clip=None), [-2 * 1.28, -2 * 0.5, 3, 2 * 0.8]),
        (Ppo(dual_clip=2), [-2 * 1.28, -2 * 0.5, 2, 2 * 0.8]),
        (DecoupledPpo(), [-2 * 1.25 * 1.2, -2 * 0.625 * 0.8, 2, 2 * 0.25]),
        (DecoupledPpo(clip_high=0.1), [-2 * 1.25 * 1.1, -2 * 0.625 * 0.8, 2, 2 * 0.25]),
        (IcePop(), [-2 * 1.25 * 1.2, -2 * 0.625 * 0.8, 3, 0]),
        (Gspo(clip_low=0.2, clip_high=0.28), [-2 * ROOT, -2 * ROOT, 3, 2 * 0.8]),
        (
            Kimi15(tau=0.2),
            [
                -2 * log(0.6) + 0.1 * log(0.75) ** 2 / 2,
                -2 * log(0.1) + 0.1 * log(0.75) ** 2 / 2,
                log(0.3) + 0.1 * log(3) ** 2,
                2 * log(0.1) + 0.1 * log(4) ** 2,
            ],
        ),
        (
            Kimi15(tau=0.2, granularity="token"),
            [
                -2 * log(0.6) + 0.1 * log(1.5) ** 2,
                -2 * log(0.1) + 0.1 * log(2) ** 2,
                log(0.3) + 0.1 * log(3) ** 2,
                2 * log(0.1) + 0.1 * log(4) ** 2,
            ],
        ),
        (Supervised(), [-log(0.6), -log(0.1), -log(0.3), -log(0.1)]),
    ],
    ids=lambda value: str(value.name) if isinstance(value, ObjectiveSettings) else "",
)
def test_the_loss_of_each_token_by_hand(objective: ObjectiveSettings, losses: list[float]) -> None:
    loss, _ = evaluate(batch_of(*BY_HAND), objective)
    assert loss.loss_T.tolist() == pytest.approx(losses)


def test_what_a_clip_a_mask_or_a_cap_did_is_told_token_by_token() -> None:
    def told(objective: ObjectiveSettings) -> tuple[Any, Any]:
        loss = evaluate(batch_of(*BY_HAND), objective)[0]
        parts = (loss.stopped_T, loss.capped_T)
        return tuple(None if part is None else part.int().tolist() for part in parts)  # type: ignore[return-value]

    assert told(Vanilla()) == (None, None)
    assert told(Tis(cap=1)) == (None, [1, 0, 1, 0])
    assert told(SETTINGS["cispo"](clip_low=0.2)) == (None, [1, 1, 1, 1])
    assert told(Topr()) == (None, [0, 0, 1, 0])
    assert told(MaskedIs()) == ([0, 0, 1, 1], None)
    assert told(Ppo(dual_clip=2)) == ([1, 0, 1, 1], None)
    assert told(DecoupledPpo(clip_high=0.1)) == ([1, 0, 0, 0], [0, 0, 1, 0])
    assert told(IcePop(clip_high=0.1)) == ([1, 0, 0, 1], None)
    assert told(Gspo(clip_low=0.2, clip_high=0.28)) == ([0, 0, 0, 1], None)


def test_topr_by_reward_and_by_advantage_differ_on_a_failure_that_is_above_average() -> None:
    sequence = Sequence(log([0.1]), log([0.1]), log([0.4]), advantage=0.5, reward=0)
    for sign, weight in (("advantage", 1.0), ("reward", 0.25)):
        loss, _ = evaluate(batch_of(sequence), SETTINGS["topr"](sign=sign))
        assert loss.weight_T is not None
        assert loss.weight_T.tolist() == pytest.approx([weight])


def test_toprs_sequence_weight_is_the_product_and_its_tokens_weight_is_not() -> None:
    sequence = Sequence(log([0.2, 0.4]), log([0.2, 0.4]), log([0.4, 0.2]), advantage=-1)
    for granularity, weights in (("sequence", [1, 1]), ("token", [0.5, 1])):
        loss, _ = evaluate(batch_of(sequence), SETTINGS["topr"](granularity=granularity))
        assert loss.weight_T is not None
        assert loss.weight_T.tolist() == pytest.approx(weights)


# ── by definition: loss and gradient of every token, with loops instead of tensors ───────────

Reference = Callable[[Sequence, int, Any], tuple[float, float]]


def clipped(ratio: float, advantage: float, p: Any, bound: float | None = None):
    """PPO's loss of a ratio, and its derivative by log ratio."""
    gain, derivative = ratio * advantage, ratio * advantage
    edge = min(max(ratio, 1 - p.clip_low), 1 + p.clip_high) * advantage
    if edge < gain:
        gain, derivative = edge, 0.0
    if bound is not None and advantage < 0 and gain < bound * advantage:
        gain, derivative = bound * advantage, 0.0
    return -gain, -derivative


def weighted(sequence: Sequence, t: int, weight: float) -> tuple[float, float]:
    return -weight * sequence.advantage * sequence.now[t], -weight * sequence.advantage


def _tis(s: Sequence, t: int, p: Any):
    return weighted(s, t, min(math.exp(s.now[t] - s.behaviour[t]), p.cap))


def _cispo(s: Sequence, t: int, p: Any):
    ratio = math.exp(s.now[t] - s.behaviour[t])
    return weighted(s, t, min(max(ratio, 1 - p.clip_low), 1 + p.clip_high))


def _topr(s: Sequence, t: int, p: Any):
    logs = sum(s.now - s.behaviour) if p.granularity == "sequence" else s.now[t] - s.behaviour[t]
    positive = (s.advantage if p.sign == "advantage" else s.reward) > 0
    return weighted(s, t, 1.0 if positive else min(math.exp(logs), 1.0))


def _masked_is(s: Sequence, t: int, p: Any):
    logs = s.now - s.behaviour
    judged = {"token": logs[t], "geometric": logs.mean(), "sequence": logs.sum()}[p.granularity]
    weight = math.exp(logs.sum() if p.granularity == "sequence" else logs[t])
    return weighted(s, t, weight if p.low <= math.exp(judged) <= p.high else 0.0)


def _kimi15(s: Sequence, t: int, p: Any):
    logs = s.now - s.behaviour
    if p.granularity == "token":
        square, slope = logs[t] ** 2, 2 * logs[t]
    else:
        square, slope = logs.sum() ** 2 / len(s), 2 * logs.sum()
    loss, derivative = weighted(s, t, 1.0)
    return loss + p.tau / 2 * square, derivative + p.tau / 2 * slope


def _ppo(s: Sequence, t: int, p: Any):
    return clipped(math.exp(s.now[t] - s.behaviour[t]), s.advantage, p, p.dual_clip)


def _decoupled(s: Sequence, t: int, p: Any):
    weight = min(math.exp(s.prox[t] - s.behaviour[t]), p.max_behaviour_weight)
    loss, derivative = clipped(math.exp(s.now[t] - s.prox[t]), s.advantage, p)
    return weight * loss, weight * derivative


def _icepop(s: Sequence, t: int, p: Any):
    weight = math.exp(s.prox[t] - s.behaviour[t])
    loss, derivative = clipped(math.exp(s.now[t] - s.prox[t]), s.advantage, p)
    return (weight * loss, weight * derivative) if p.low <= weight <= p.high else (0.0, 0.0)


def _gspo(s: Sequence, t: int, p: Any):
    return clipped(math.exp((s.now - s.behaviour).mean()), s.advantage, p)


REFERENCES: dict[str, Reference] = {
    "vanilla": lambda s, t, p: weighted(s, t, 1.0),
    "opmd": lambda s, t, p: weighted(s, t, 1 / (1 + p.tau)),
    "tis": _tis,
    "cispo": _cispo,
    "topr": _topr,
    "masked_is": _masked_is,
    "kimi15": _kimi15,
    "ppo": _ppo,
    "decoupled_ppo": _decoupled,
    "icepop": _icepop,
    "gspo": _gspo,
    "supervised": lambda s, t, p: (-s.now[t], -1.0),
}
VARIANTS = [
    *(kind() for kind in SETTINGS.values()),
    Opmd(tau=0.3),
    Tis(cap=1.0),
    SETTINGS["cispo"](clip_low=0.5, clip_high=3.0),
    *(Topr(granularity=g, sign=s) for g in ("sequence", "token") for s in ("reward", "advantage")),  # type: ignore[arg-type]
    *(MaskedIs(granularity=g, low=0.3, high=5) for g in ("token", "geometric", "sequence")),  # type: ignore[arg-type]
    Kimi15(granularity="token", tau=0.5),
    Ppo(clip_low=0.4, clip_high=0.1, dual_clip=1.5),
    DecoupledPpo(clip_low=0.1, clip_high=0.4, max_behaviour_weight=1.3),
    Gspo(clip_low=0.3, clip_high=0.3),
]


def test_there_is_a_reference_and_a_function_for_every_name() -> None:
    assert REFERENCES.keys() == OBJECTIVES.keys() == SETTINGS.keys()


@pytest.mark.parametrize("objective", VARIANTS, ids=lambda o: str(o.name))
@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**9))
def test_loss_and_gradient_are_those_of_the_definition(
    objective: ObjectiveSettings, seed: int
) -> None:
    sequences = random_sequences(seed)
    loss, gradient = evaluate(batch_of(*sequences), objective)
    reference = REFERENCES[objective.name]
    expected = [reference(s, t, objective) for s in sequences for t in range(len(s))]
    np.testing.assert_allclose(loss.loss_T.detach(), [e[0] for e in expected], rtol=1e-9)
    np.testing.assert_allclose(gradient, [e[1] for e in expected], rtol=1e-9, atol=1e-12)


# The others have weights without gradient, so that theirs is not the derivative of their loss.
DERIVATIVES = ("ppo", "decoupled_ppo", "icepop", "kimi15", "supervised", "vanilla", "opmd")


@pytest.mark.parametrize(
    "objective", [o for o in VARIANTS if o.name in DERIVATIVES], ids=lambda o: str(o.name)
)
def test_the_gradient_is_that_of_finite_differences(objective: ObjectiveSettings) -> None:
    sequences = random_sequences(3)
    _, gradient = evaluate(batch_of(*sequences), objective)
    step, place = 1e-6, 0
    for sequence in sequences:
        for t in range(len(sequence)):
            losses = []
            for sign in (1, -1):
                sequence.now[t] += sign * step
                loss = make_objective(objective)(batch_of(*sequences)).loss_T
                losses.append(float(loss.detach().sum()))
                sequence.now[t] -= sign * step
            assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(gradient[place], abs=1e-5)
            place += 1


# ── identities ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "objective", [o for o in VARIANTS if o.name != "supervised"], ids=lambda o: str(o.name)
)
def test_on_tokens_of_the_policy_itself_it_is_the_policy_gradient(
    objective: ObjectiveSettings,
) -> None:
    sequences = random_sequences(1, spread=0.0)
    _, gradient = evaluate(batch_of(*sequences), objective)
    factor = 1 / (1 + objective.tau) if isinstance(objective, Opmd) else 1.0
    advantages = [s.advantage for s in sequences for _ in range(len(s))]
    assert gradient == pytest.approx([-factor * a for a in advantages])


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**9))
def test_decoupled_is_ppo_where_proximal_is_behaviour(seed: int) -> None:
    sequences = random_sequences(seed)
    for sequence in sequences:
        sequence.prox = sequence.behaviour
    decoupled, decoupled_gradient = evaluate(batch_of(*sequences), DecoupledPpo())
    plain, gradient = evaluate(batch_of(*sequences), Ppo(dual_clip=None))
    np.testing.assert_allclose(decoupled.loss_T.detach(), plain.loss_T.detach(), rtol=1e-12)
    assert decoupled_gradient == pytest.approx(gradient)


def test_without_bounds_all_token_weights_are_the_same_importance_sampling() -> None:
    everything = [
        Tis(cap=1e9),
        SETTINGS["cispo"](clip_high=1e9),
        MaskedIs(low=0, high=1e9),
        MaskedIs(granularity="geometric", low=0, high=1e9),
        Ppo(clip_low=1 - 1e-12, clip_high=1e9, dual_clip=None),
        DecoupledPpo(clip_low=1 - 1e-12, clip_high=1e9, max_behaviour_weight=1e9),
    ]
    gradients = [evaluate(batch_of(*random_sequences(5)), o)[1] for o in everything]
    for gradient in gradients[1:]:
        assert gradient == pytest.approx(gradients[0])


def test_gspo_added_up_as_usual_is_the_mean_over_sequences_of_their_clipped_ratios() -> None:
    sequences = random_sequences(8)
    batch = batch_of(*sequences)
    objective = Gspo(clip_low=0.3, clip_high=0.3)
    loss_T = make_objective(objective)(batch).loss_T
    lengths = batch.sequence_lengths()
    (loss_T / lengths / len(sequences)).sum().backward()
    assert batch.logprobs_T.grad is not None
    expected = []
    for s in sequences:
        ratio = math.exp((s.now - s.behaviour).mean())
        _, derivative = clipped(ratio, s.advantage, objective)
        expected += [derivative / len(s) / len(sequences)] * len(s)
    assert batch.logprobs_T.grad.tolist() == pytest.approx(expected)


def test_interpolated_proximal_logprobs_by_hand() -> None:
    objective = DecoupledPpo(proximal="interpolated", max_behaviour_weight=10)
    # Half of the step is done: a token of age 1 is 2/3 of the way from the sampler to the policy.
    logs = np.array([-2.0, -2.0, -2.0])
    sequence = Sequence(logs, np.full(3, np.nan), np.full(3, -1.4), ages=[0, 1, 3])
    batch = batch_of(sequence, progress=0.5)
    loss, _ = evaluate(batch, objective)
    proximal = -1.4 - 0.6 * np.array([0, 1 / 1.5, 3 / 3.5])
    ratios, weights = exp(logs - proximal), exp(proximal + 1.4)
    expected = [-w * min(r, 1.28) for r, w in zip(ratios, weights, strict=True)]
    assert loss.loss_T.tolist() == pytest.approx(expected)


def test_interpolated_is_recomputed_at_the_start_of_a_step_and_for_tokens_of_its_version() -> None:
    sequences = random_sequences(2)
    for sequence in sequences:
        sequence.prox = sequence.now
    recomputed = evaluate(batch_of(*sequences), DecoupledPpo())[1]
    assert evaluate(batch_of(*sequences), DecoupledPpo(proximal="interpolated"))[1] == recomputed
    for sequence in sequences:
        sequence.prox, sequence.ages = sequence.behaviour, [0] * len(sequence)
    recomputed = evaluate(batch_of(*sequences, progress=0.5), DecoupledPpo())[1]
    batch = batch_of(*sequences, progress=0.5)
    assert evaluate(batch, DecoupledPpo(proximal="interpolated"))[1] == recomputed


@pytest.mark.parametrize("objective", VARIANTS, ids=lambda o: str(o.name))
def test_a_sequence_is_treated_alike_whatever_it_is_packed_with(
    objective: ObjectiveSettings,
) -> None:
    sequences = [s for seed in range(4) for s in random_sequences(seed)]
    together, gradient = evaluate(batch_of(*sequences), objective)
    alone = [evaluate(batch_of(s), objective) for s in sequences]
    losses = torch.cat([loss.loss_T for loss, _ in alone]).detach()
    np.testing.assert_allclose(together.loss_T.detach(), losses, rtol=1e-12)
    assert gradient == pytest.approx([g for _, of_one in alone for g in of_one])


@pytest.mark.parametrize("objective", VARIANTS, ids=lambda o: str(o.name))
def test_ratios_beyond_all_numbers_give_no_nan(objective: ObjectiveSettings) -> None:
    far = Sequence(np.array([-1.0, -300.0]), np.array([-1.0, -300.0]), np.array([-300.0, -1.0]))
    for advantage in (1.0, -1.0, 0.0):
        far.advantage = advantage
        double = batch_of(far)
        batch = TokenBatch(
            **{
                name: value.float().detach() if torch.is_floating_point(value) else value
                for name in TokenBatch.__dataclass_fields__
                if isinstance(value := getattr(double, name), torch.Tensor)
            },
            num_sequences=1,
        )
        batch.logprobs_T.requires_grad_()
        loss = make_objective(objective)(batch)
        loss.loss_T.sum().backward()
        assert batch.logprobs_T.grad is not None
        assert torch.isfinite(loss.loss_T).all()
        assert torch.isfinite(batch.logprobs_T.grad).all()


def test_an_empty_pack_has_an_empty_loss() -> None:
    nothing = Sequence(np.array([]), np.array([]), np.array([]))
    for kind in SETTINGS.values():
        assert make_objective(kind())(batch_of(nothing)).loss_T.shape == (0,)


def test_the_objective_of_the_docs_is_one_of_the_users_own_and_is_truncated_importance_sampling(
    tmp_path, monkeypatch
):
    docs = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
    (tmp_path / "my_loss.py").write_text(docs.split("```python\n")[1].split("```")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    sequences = [
        Sequence([-1.0, -2.0], prox=[0, 0], behaviour=[-1.5, -0.5], advantage=2.0),
        Sequence([-0.1], prox=[0], behaviour=[-3.0], advantage=-1.0),
    ]
    own, own_gradient = evaluate(batch_of(*sequences), Function(run="my_loss:reinforce"))
    tis, gradient = evaluate(batch_of(*sequences), Tis(cap=2.0))
    assert own.loss_T.tolist() == pytest.approx(tis.loss_T.tolist())
    assert own.weight_T.tolist() == pytest.approx(tis.weight_T.tolist())
    assert own_gradient == pytest.approx(gradient)
