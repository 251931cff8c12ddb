"""Divergence from a reference policy, against values worked by hand and against autograd."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flash.trainer.objectives.regularisers import kl_estimate, kl_loss, kl_penalty
from flash.trainer.objectives.settings import Estimator
from flash.trainer.objectives.token_batch import TokenBatch

ESTIMATORS: tuple[Estimator, ...] = ("k1", "k2", "k3")


def batch_of(
    logprobs_T: torch.Tensor, behaviour_T: torch.Tensor, sequences: list[int]
) -> TokenBatch:
    return TokenBatch(
        logprobs_T=logprobs_T,
        behaviour_logprobs_T=behaviour_T,
        proximal_logprobs_T=logprobs_T.detach(),
        advantages_T=torch.zeros_like(behaviour_T),
        rewards_T=torch.zeros_like(behaviour_T),
        ages_T=torch.zeros(len(sequences), dtype=torch.int64),
        sequences_T=torch.tensor(sequences),
        num_sequences=max(sequences) + 1,
    )


def tensor(values: object) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float64)


def test_the_three_estimates_by_hand() -> None:
    p, q = tensor(np.log([0.5, 0.2])), tensor(np.log([0.25, 0.4]))
    x = np.log([2, 0.5])
    assert kl_estimate(p, q, "k1").tolist() == pytest.approx(x)
    assert kl_estimate(p, q, "k2").tolist() == pytest.approx(x**2 / 2)
    assert kl_estimate(p, q, "k3").tolist() == pytest.approx([0.5 - 1 + x[0], 2 - 1 + x[1]])


@given(st.floats(-8, 0), st.floats(-8, 0))
def test_k2_and_k3_are_never_negative_and_zero_for_equal_policies(p: float, q: float) -> None:
    for estimator in ("k2", "k3"):
        of_both = kl_estimate(tensor([p, p]), tensor([q, p]), estimator)  # type: ignore[arg-type]
        assert float(of_both[0]) >= 0
        assert float(of_both[1]) == 0


def test_k1_and_k3_average_to_the_divergence() -> None:
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    divergence = (p * np.log(p / q)).sum()
    for estimator in ("k1", "k3"):
        estimates = kl_estimate(tensor(np.log(p)), tensor(np.log(q)), estimator)  # type: ignore[arg-type]
        assert (p * estimates.numpy()).sum() == pytest.approx(divergence)


# The mean over what a sampler samples is exact here: it is a sum over all four tokens.
LOGITS, REFERENCE = tensor([0.3, -1.0, 0.5, 0.0]), tensor([1.0, 0.0, -0.5, 0.2]).log_softmax(0)
SAMPLER = tensor([-0.5, 0.2, 1.0, 0.4]).log_softmax(0)


def gradient_of_mean_loss(sampler: torch.Tensor, estimator: Estimator, corrected: bool):
    logits = LOGITS.clone().requires_grad_()
    batch = batch_of(logits.log_softmax(0), sampler, [0, 0, 0, 0])
    loss_T = kl_loss(batch, REFERENCE, estimator=estimator, corrected=corrected)
    (sampler.exp() * loss_T).sum().backward()
    assert logits.grad is not None
    return logits.grad.tolist()


def gradient_of_divergence() -> list[float]:
    logits = LOGITS.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    (logprobs.exp() * (logprobs - REFERENCE)).sum().backward()
    assert logits.grad is not None
    gradient: list[float] = logits.grad.tolist()
    return gradient


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_corrected_it_has_the_divergences_own_gradient_whoever_sampled(
    estimator: Estimator,
) -> None:
    for sampler in (SAMPLER, LOGITS.log_softmax(0)):
        found = gradient_of_mean_loss(sampler, estimator, True)
        assert found == pytest.approx(gradient_of_divergence())


def test_uncorrected_k2_has_it_on_policy_k3_has_another_and_k1_none() -> None:
    on_policy = LOGITS.log_softmax(0)
    assert gradient_of_mean_loss(on_policy, "k2", False) == pytest.approx(gradient_of_divergence())
    assert gradient_of_mean_loss(on_policy, "k3", False) != pytest.approx(gradient_of_divergence())
    assert gradient_of_mean_loss(on_policy, "k1", False) == pytest.approx([0] * 4)


def test_the_penalty_of_a_token_is_that_of_itself_and_all_later_ones_of_its_sequence() -> None:
    now, reference = tensor([0.0, -1.0, -2.0, -3.0, -1.0]), tensor([-1.0, -3.0, -6.0, -3.0, 0.0])
    batch = batch_of(now.requires_grad_(), torch.zeros(5), [0, 0, 0, 1, 1])
    penalty_T = kl_penalty(batch, reference, estimator="k1")
    assert penalty_T.tolist() == pytest.approx([1 + 2 + 4, 2 + 4, 4, -1, -1])
    assert not penalty_T.requires_grad


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=6), min_size=1, max_size=5))
def test_sums_from_here_are_those_of_a_loop(sequences: list[list[float]]) -> None:
    numbers = [i for i, values in enumerate(sequences) for _ in values]
    values_T = tensor([value for values in sequences for value in values])
    batch = batch_of(values_T, values_T, numbers)
    expected = [sum(values[t:]) for values in sequences for t in range(len(values))]
    np.testing.assert_allclose(batch.sums_from_here(values_T), expected, atol=1e-9)
