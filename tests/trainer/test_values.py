"""From a critic's values to advantages and returns: by hand, and against the definitions."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from flash.fakes import fake_sample
from flash.trainer.advantage_settings import Gae, ReinforcePp
from flash.trainer.advantages import gae, make_advantages
from flash.trainer.config import TrainerConfig
from flash.trainer.critic import value_loss
from flash.trainer.objectives.settings import KlSettings
from flash.trainer.values import ValuedSample, less_penalties, token_rewards, trained, with_values
from flash.types import Sample, Trajectory

Floats = NDArray[np.float64]
PLAIN = Gae(whiten=False)


def sample_of(
    turns: Sequence[int], *, reward: float = 0.0, rewards: Sequence[float] = (), episode: int = 0
) -> Sample:
    """`turns` says of each token whose turn it is, -1 for none."""
    return fake_sample(
        range(len(turns)),
        [float(turn >= 0) for turn in turns],
        turns=np.array(turns),
        reward=reward,
        turn_rewards=rewards,
        episode=episode,
    )


# ── advantages ───────────────────────────────────────────────────────────────────────────────


def test_gae_by_hand() -> None:
    # Surprises 0 + 0.5·4 - 2 = 0, 1 + 0.5·2 - 4 = -2 and 3 - 2 = 1; γλ = 0.25.
    rewards, values = np.array([0.0, 1.0, 3.0]), np.array([2.0, 4.0, 2.0])
    found = gae(rewards, values, gamma=0.5, lam=0.5)
    assert found.tolist() == pytest.approx([0.25 * -1.75, -2 + 0.25, 1])


numbers = st.floats(-5, 5)
shares = st.floats(0, 1)


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12), shares, shares)
def test_gae_is_the_weighted_mean_of_advantages_of_all_horizons(
    steps: list[tuple[float, float]], gamma: float, lam: float
) -> None:
    rewards, values = np.array(steps).T
    count = len(steps)
    values_after = np.append(values, 0.0)
    expected = np.zeros(count)
    for t in range(count):
        # Schulman et al. 2016, eqs. 11 to 16: (1 - λ)·Σ λ^(k-1)·A^(k), the last horizon for all
        # that reach beyond the end.
        for k in range(1, count - t + 1):
            discounted = sum(gamma**i * rewards[t + i] for i in range(k))
            of_horizon = discounted + gamma**k * values_after[t + k] - values[t]
            last = k == count - t
            expected[t] += (lam ** (k - 1) if last else (1 - lam) * lam ** (k - 1)) * of_horizon
    np.testing.assert_allclose(gae(rewards, values, gamma=gamma, lam=lam), expected, atol=1e-9)


def test_the_reward_of_a_turn_follows_its_last_trained_token() -> None:
    turns = [-1, 0, 0, -1, 1, -1, 3, 3]
    # Turn 2 has no token: its reward goes to what came before.
    rewards = token_rewards([sample_of(turns, rewards=[1.0, 2.0, 10.0, 4.0])])
    assert rewards.tolist() == [0, 1, 12, 0, 4]


def test_a_turn_without_any_token_before_it_rewards_the_first() -> None:
    assert token_rewards([sample_of([-1, 1], rewards=[5.0, 1.0])]).tolist() == [6]


def test_rewards_of_turns_are_found_across_the_samples_of_an_episode() -> None:
    first, second = ([-1, 0, 0], [-1, -1, 1])
    samples = [sample_of(turns, rewards=[1.0, 2.0]) for turns in (first, second)]
    assert token_rewards(samples).tolist() == [0, 1, 2]


def test_without_rewards_of_turns_the_episodes_reward_follows_its_last_token() -> None:
    samples = [sample_of([-1, 0, 0], reward=3.0), sample_of([-1, 1, -1], reward=3.0)]
    assert token_rewards(samples).tolist() == [0, 0, 3]


def test_the_first_token_of_a_sample_is_never_trained() -> None:
    sample = sample_of([0, 0, 0], reward=1.0)
    assert trained(sample).tolist() == [False, True, True]
    assert sample.loss_mask.tolist() == [1, 1, 1]
    assert token_rewards([sample]).tolist() == [0, 1]


def test_an_episode_is_one_trajectory_through_its_samples_and_observations() -> None:
    samples = [
        sample_of([-1, 0, -1], reward=1.0, episode=7),
        sample_of([-1, 0], reward=-2.0, episode=8),
        sample_of([-1, 1, 1], reward=1.0, episode=7),
    ]
    values = [np.array([0.5]), np.array([1.0]), np.array([2.0, 3.0])]
    valued, metrics = with_values(samples, values, Gae(gamma=0.5, lam=1.0, whiten=False))
    # Of episode 7 the returns are 1, 0.5, 0.25 backwards, whatever lies between its tokens.
    assert [v.returns.tolist() for v in valued] == [[0, 0.25, 0], [0, -2], [0, 0.5, 1]]
    assert [v.values.tolist() for v in valued] == [[0, 0.5, 0], [0, 1], [0, 2, 3]]
    advantages = [np.asarray(v.advantage).tolist() for v in valued]
    assert advantages == [[0, -0.25, 0], [0, -3], [0, -1.5, -2]]
    assert [v.episode for v in valued] == [7, 8, 7]
    returns, known = np.array([0.25, -2, 0.5, 1]), np.array([0.5, 1, 2, 3])
    explained = 1 - np.var(returns - known) / np.var(returns)
    assert metrics["critic/explained_variance"] == pytest.approx(explained)
    assert metrics["critic/value_mean"] == pytest.approx(known.mean())
    assert metrics["critic/return_mean"] == pytest.approx(returns.mean())


def test_whitening_and_clip_change_advantages_and_never_what_the_critic_learns() -> None:
    samples = [sample_of([-1, 0, 0], reward=float(i), episode=i) for i in range(5)]
    values = [np.array([0.3 * i, 0.1]) for i in range(5)]
    plain, _ = with_values(samples, values, PLAIN)
    white, _ = with_values(samples, values, Gae(clip=1.0))

    def advantages(valued: Sequence[ValuedSample]) -> Floats:
        return np.concatenate([np.asarray(v.advantage)[1:] for v in valued])

    raw = advantages(plain)
    expected = np.clip((raw - raw.mean()) / raw.std(), -1, 1)
    np.testing.assert_allclose(advantages(white), expected, atol=1e-6)
    assert (expected == 1).any()
    for one, other in zip(plain, white, strict=True):
        assert one.returns.tolist() == other.returns.tolist()


def test_equal_returns_have_no_variance_to_explain() -> None:
    _, metrics = with_values([sample_of([-1, 0], reward=1.0)], [np.array([0.2])], PLAIN)
    assert "critic/explained_variance" not in metrics


def test_at_hand_over_there_is_no_critic_yet_and_a_group_may_be_of_one() -> None:
    episode = Trajectory(sequences=[sample_of([-1, 0])], reward=1.0, turns=1)
    assert make_advantages(Gae())([[episode], [episode]]) == [[0.0], [0.0]]


# ── the critic's loss ────────────────────────────────────────────────────────────────────────


def test_the_value_loss_by_hand_and_its_gradient_is_the_error_or_nothing_where_it_is_clipped() -> (
    None
):
    # near, moved too far toward the return, too far away from it, and too far past it
    values = torch.tensor([1.2, 2.0, -1.0, 5.0], dtype=torch.float64, requires_grad=True)
    old = torch.ones(4, dtype=torch.float64)
    returns = torch.tensor([2.0, 3.0, 3.0, 2.0], dtype=torch.float64)
    loss, stopped = value_loss(values, old, returns, clip=0.5)
    # The clip allows 0.5 to 1.5; errors -0.8, -1.5 (clipped), -4, 3.
    assert loss.tolist() == pytest.approx([0.32, 1.125, 8, 4.5])
    assert stopped.tolist() == [0, 1, 0, 0]
    loss.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([-0.8, 0, -4, 3])


@given(st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=9))
def test_the_value_loss_is_that_of_its_definition(tokens: list[tuple[float, ...]]) -> None:
    values, old, returns = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*tokens, strict=True)
    )
    expected = []
    for v, o, r in tokens:
        near = min(max(v, o - 0.2), o + 0.2)
        expected.append(max((v - r) ** 2, (near - r) ** 2) / 2)
    found = value_loss(values, old, returns, clip=0.2)[0].tolist()
    assert found == pytest.approx(expected)
    unclipped = value_loss(values, old, returns, clip=None)[0]
    torch.testing.assert_close(unclipped, (values - returns) ** 2 / 2)


# ── less a divergence ────────────────────────────────────────────────────────────────────────


def test_a_divergence_is_taken_from_the_returns_before_they_are_whitened() -> None:
    """Returns 1 and 0 less β·ΣKL: 1 - 0.5·[2, 1] = [0, 0.5] and 0 - 0.5·[1, 3] = [-0.5, -1.5]."""
    kl = KlSettings(coefficient=0.5, place="reward", estimator="k1")
    config = TrainerConfig(advantages=ReinforcePp(), kl=kl)
    samples = [fake_sample(range(3), advantage=1.0), fake_sample(range(3), advantage=0.0)]
    penalties = [np.array([2.0, 1.0]), np.array([1.0, 3.0])]
    mean, deviation = -0.375, np.sqrt(0.546875)  # of those four
    expected = (np.array([0.0, 0.5, -0.5, -1.5]) - mean) / deviation
    found = less_penalties(samples, penalties, config)
    np.testing.assert_allclose(found[0].advantage, [0, *expected[:2]], rtol=1e-6)
    np.testing.assert_allclose(found[1].advantage, [0, *expected[2:]], rtol=1e-6)
    clipped = less_penalties(
        samples, penalties, TrainerConfig(advantages=ReinforcePp(clip=1.0), kl=kl)
    )
    assert clipped[1].advantage.min() == -1.0, "and clipped last"


def test_returns_that_the_trainer_finishes_are_neither_whitened_nor_clipped_before() -> None:
    config = TrainerConfig(
        advantages=ReinforcePp(clip=0.5), kl=KlSettings(coefficient=0.5, place="reward")
    )
    assert config.finishes_advantages
    raw = make_advantages(config.advantages, finished=False)
    trajectories = [
        Trajectory(sequences=[fake_sample(range(3))], reward=reward, turns=1) for reward in (3, 1)
    ]
    assert raw([trajectories]) == [[3, 1]]
