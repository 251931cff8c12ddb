import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from flash.trainer.advantages import grpo
from flash.trainer.config import TrainerConfig
from flash.trainer.objectives import (
    TokenBatch,
    decoupled_ppo_loss,
    kl_k3,
    make_objective,
    supervised_loss,
)

SETTINGS = {"clip_low": 0.2, "clip_high": 0.3, "max_behaviour_weight": 2.0}
Floats = NDArray[np.float64]
logs = st.floats(-8, 0)


def batch_of(now: Floats, prox: Floats, behaviour: Floats, advantages: Floats) -> TokenBatch:
    def tensor(values: Floats) -> torch.Tensor:
        return torch.tensor(np.asarray(values), dtype=torch.float64)

    return TokenBatch(
        logprobs_T=tensor(now).requires_grad_(),
        proximal_logprobs_T=tensor(prox),
        behaviour_logprobs_T=tensor(behaviour),
        advantages_T=tensor(advantages),
    )


def reference(now: float, prox: float, behaviour: float, advantage: float) -> tuple[float, float]:
    """Loss of one token and its derivative by `now`, from the definition, token by token."""
    weight = min(math.exp(prox - behaviour), SETTINGS["max_behaviour_weight"])
    ratio = math.exp(now - prox)
    low, high = 1 - SETTINGS["clip_low"], 1 + SETTINGS["clip_high"]
    clipped = min(max(ratio, low), high)
    gain = min(ratio * advantage, clipped * advantage)
    moves = ratio * advantage <= clipped * advantage
    return -weight * gain, -weight * ratio * advantage if moves else 0.0


def test_decoupled_ppo_by_hand() -> None:
    # ratios 1.5 and 0.5, weights 1.25 and (capped from 4) 2, advantages 2 and -1
    batch = batch_of(
        np.log([0.6, 0.1]), np.log([0.4, 0.2]), np.log([0.32, 0.05]), np.array([2.0, -1.0])
    )
    loss_T, metrics = decoupled_ppo_loss(batch, **SETTINGS)
    # -(1.25 · 1.3 · 2) and 2 · 0.8 · 1
    assert loss_T.tolist() == pytest.approx([-3.25, 1.6])
    assert metrics["ratio/mean"].tolist() == pytest.approx([1.5, 0.5])
    assert metrics["weight/mean"].tolist() == pytest.approx([1.25, 2.0])
    assert metrics["weight/capped_fraction"].tolist() == [0, 1]
    assert metrics["ratio/clip_fraction"].tolist() == [1, 1]


@settings(deadline=None)
@given(st.lists(st.tuples(logs, logs, logs, st.floats(-3, 3)), min_size=1, max_size=20))
def test_decoupled_ppo_equals_the_reference_and_its_gradient_the_closed_form(
    tokens: list[tuple[float, float, float, float]],
) -> None:
    edges = (1 - SETTINGS["clip_low"], 1 + SETTINGS["clip_high"])
    # At the very edge of the clip the derivative depends on the last bit.
    tokens = [t for t in tokens if min(abs(math.exp(t[0] - t[1]) - e) for e in edges) > 1e-9]
    if not tokens:
        return
    batch = batch_of(*np.array(tokens).T)
    loss_T, _ = decoupled_ppo_loss(batch, **SETTINGS)
    loss_T.sum().backward()
    expected = [reference(*token) for token in tokens]
    np.testing.assert_allclose(loss_T.detach().numpy(), [e[0] for e in expected], rtol=1e-9)
    grad = batch.logprobs_T.grad
    assert grad is not None
    np.testing.assert_allclose(grad.numpy(), [e[1] for e in expected], rtol=1e-9)


def test_at_ratio_one_and_weight_one_it_is_the_policy_gradient() -> None:
    now, advantages = np.log([0.1, 0.5, 0.9]), np.array([1.5, -2.0, 0.0])
    batch = batch_of(now, now, now, advantages)
    loss_T, _ = decoupled_ppo_loss(batch, **SETTINGS)
    loss_T.sum().backward()
    assert batch.logprobs_T.grad is not None
    assert batch.logprobs_T.grad.tolist() == pytest.approx((-advantages).tolist())


def test_with_proximal_equal_to_behaviour_it_is_plain_ppo() -> None:
    rng = np.random.default_rng(0)
    now, behaviour, advantages = rng.uniform(-3, 0, 50), rng.uniform(-3, 0, 50), rng.normal(size=50)
    loss_T, _ = decoupled_ppo_loss(batch_of(now, behaviour, behaviour, advantages), **SETTINGS)
    ratio = np.exp(now - behaviour)
    plain = -np.minimum(ratio * advantages, np.clip(ratio, 0.8, 1.3) * advantages)
    np.testing.assert_allclose(loss_T.detach().numpy(), plain, rtol=1e-9)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clips"),
    [(1.4, 1, True), (1.4, -1, False), (0.7, 1, False), (0.7, -1, True), (1.1, 1, False)],
)
def test_a_token_is_clipped_only_where_it_would_go_further_the_same_way(
    ratio: float, advantage: float, clips: bool
) -> None:
    batch = batch_of(np.log([0.1 * ratio]), np.log([0.1]), np.log([0.1]), np.array([advantage]))
    loss_T, metrics = decoupled_ppo_loss(batch, **SETTINGS)
    loss_T.sum().backward()
    assert batch.logprobs_T.grad is not None
    assert (float(batch.logprobs_T.grad) == 0) == clips
    assert bool(metrics["ratio/clip_fraction"]) == clips


def test_the_weight_has_a_cap_and_no_gradient() -> None:
    batch = batch_of(np.log([0.5]), np.log([0.5]), np.log([1e-6]), np.array([1.0]))
    loss_T, _ = decoupled_ppo_loss(batch, **SETTINGS)
    loss_T.sum().backward()
    assert batch.logprobs_T.grad is not None
    assert float(batch.logprobs_T.grad) == pytest.approx(-2.0)


@settings(deadline=None)
@given(logs, logs)
def test_k3_is_never_negative_and_zero_for_equal_policies(now: float, sampler: float) -> None:
    pair = torch.tensor([now, now], dtype=torch.float64)
    other = torch.tensor([sampler, now], dtype=torch.float64)
    kl_T = kl_k3(pair, other)
    assert float(kl_T[0]) >= 0
    assert float(kl_T[1]) == 0


def test_k3_averages_to_the_divergence_of_the_sampler_from_the_policy() -> None:
    sampler, policy = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    k3 = kl_k3(torch.tensor(np.log(policy)), torch.tensor(np.log(sampler))).numpy()
    assert (sampler * k3).sum() == pytest.approx((sampler * np.log(sampler / policy)).sum())


def test_the_configuration_names_the_objective_and_its_settings() -> None:
    batch = batch_of(np.log([0.9]), np.log([0.1]), np.log([0.01]), np.array([1.0]))
    config = TrainerConfig(clip_low=0.1, clip_high=0.5, max_behaviour_weight=3.0)
    assert make_objective(config)(batch)[0].tolist() == pytest.approx([-4.5])
    assert supervised_loss(batch)[0].tolist() == pytest.approx([-math.log(0.9)])
    supervised = make_objective(TrainerConfig(objective="supervised"))
    assert supervised(batch)[0].tolist() == pytest.approx([-math.log(0.9)])


def test_grpo_by_hand() -> None:
    # mean 1, deviation 1 (of the population)
    assert grpo(np.array([0.0, 2.0])).tolist() == [-1.0, 1.0]
    third = math.sqrt(3)
    assert grpo(np.array([0.0, 0.0, 0.0, 1.0])).tolist() == pytest.approx(
        [-1 / third, -1 / third, -1 / third, third]
    )


def test_equal_rewards_say_nothing() -> None:
    assert grpo(np.full(5, 0.1)).tolist() == [0.0] * 5


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="group_size"):
        grpo(np.array([1.0]))
