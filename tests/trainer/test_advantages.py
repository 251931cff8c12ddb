"""Advantages against values worked by hand, and against their definitions."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter

from flash.fakes import fake_sample
from flash.trainer.advantage_settings import AnyAdvantages
from flash.trainer.advantages import (
    discounted_returns,
    dr_grpo,
    gigpo,
    grpo,
    make_advantages,
    per_group,
    rloo,
    turn_returns,
)
from flash.types import Trajectory

Floats = NDArray[np.float64]
rewards_of_groups = st.lists(st.floats(-3, 3), min_size=2, max_size=9).map(np.array)


def episode(reward: float, turns: Sequence[int] = (2,), states: Sequence[str] = ()) -> Trajectory:
    """Of turns with so many tokens each, the last of which is rewarded."""
    marks = [mark for turn, tokens in enumerate(turns) for mark in [-1] + [turn] * tokens]
    mask = [float(mark >= 0) for mark in marks]
    return Trajectory(
        sequences=[fake_sample(marks, mask, turns=np.array(marks))],
        reward=reward,
        turns=len(turns),
        turn_rewards=[0.0] * (len(turns) - 1) + [reward],
        turn_states=states or [f"state {turn}" for turn in range(len(turns))],
    )


def advantages(groups: Sequence[Sequence[Trajectory]], name: str, **settings: Any) -> Any:
    chosen: Any = TypeAdapter(AnyAdvantages).validate_python({"name": name, **settings})
    return [[one.tolist() for one in group] for group in make_advantages(chosen)(groups)]


# ── one number an episode ────────────────────────────────────────────────────────────────────


def test_grpo_by_hand() -> None:
    # mean 1, deviation 1 (of the population)
    assert grpo(np.array([0.0, 2.0])).tolist() == [-1.0, 1.0]
    third = math.sqrt(3)
    assert grpo(np.array([0.0, 0.0, 0.0, 1.0])).tolist() == pytest.approx(
        [-1 / third, -1 / third, -1 / third, third]
    )


def test_dr_grpo_and_rloo_by_hand() -> None:
    rewards = np.array([0.0, 0.0, 3.0])
    assert dr_grpo(rewards).tolist() == [-1.0, -1.0, 2.0]
    assert grpo(rewards, std=False).tolist() == [-1.0, -1.0, 2.0]
    # the mean of the others: 1.5, 1.5, 0
    assert rloo(rewards).tolist() == [-1.5, -1.5, 3.0]


@given(rewards_of_groups)
def test_rloo_leaves_each_reward_out_of_its_own_baseline(rewards: Floats) -> None:
    others = [np.delete(rewards, i).mean() for i in range(len(rewards))]
    np.testing.assert_allclose(rloo(rewards), rewards - others, atol=1e-9)


@given(rewards_of_groups)
def test_grpo_has_mean_zero_and_deviation_one_or_none(rewards: Floats) -> None:
    advantages_G = grpo(rewards)
    assert abs(advantages_G.mean()) < 1e-6
    assert advantages_G.std() == pytest.approx(1) or (advantages_G == 0).all()


def test_equal_rewards_say_nothing() -> None:
    for function in (grpo, dr_grpo, rloo):
        assert function(np.full(5, 0.1)).tolist() == pytest.approx([0.0] * 5)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "turn_returns", "gigpo"])
def test_a_group_of_one_is_refused_with_what_to_use_instead(name: str) -> None:
    with pytest.raises(ValueError, match=r"group_size to 2 or more.*advantages to reinforce"):
        advantages([[episode(1.0)]], name)


# ── one number a turn ────────────────────────────────────────────────────────────────────────


def test_discounted_returns_by_hand() -> None:
    assert discounted_returns(np.array([1.0, 0.0, 4.0]), 0.5).tolist() == [2.0, 2.0, 4.0]
    assert discounted_returns(np.array([]), 0.5).tolist() == []


def test_turn_returns_by_hand() -> None:
    # returns 0.5, 1 and 0, 0, 0; their mean is 0.3
    group = [np.array([0.0, 1.0]), np.zeros(3)]
    first, second = turn_returns(group, gamma=0.5, std=False)
    assert first.tolist() == pytest.approx([0.2, 0.7])
    assert second.tolist() == pytest.approx([-0.3] * 3)
    deviation = np.array([0.5, 1, 0, 0, 0]).std()
    first, _ = turn_returns(group, gamma=0.5, std=True)
    assert first.tolist() == pytest.approx([0.2 / deviation, 0.7 / deviation])


def test_gigpo_by_hand() -> None:
    # Episodes: rewards 1 and 0 give 0.5 and -0.5. Both meet the kitchen, with returns 0.5 (then 1
    # in the hall) and 0; the first meets the hall, the second the garden, alone.
    settings: Any = {"gamma": 0.5, "omega": 2.0, "std": False}
    states = [["kitchen", "hall"], ["garden", "kitchen"]]
    first, second = gigpo(
        np.array([1.0, 0.0]), [np.array([0.0, 1.0]), np.zeros(2)], states, **settings
    )
    assert first.tolist() == pytest.approx([0.5 + 2 * 0.25, 0.5])
    assert second.tolist() == pytest.approx([-0.5, -0.5 - 2 * 0.25])


def test_gigpo_compares_a_state_that_one_episode_met_twice_with_itself() -> None:
    group = [np.array([0.0, 1.0]), np.array([0.0])]
    first, second = gigpo(
        np.array([1.0, 0.0]), group, [["a", "a"], ["b"]], gamma=0.5, omega=1.0, std=True
    )
    assert first.tolist() == pytest.approx([1 - 1, 1 + 1])
    assert second.tolist() == pytest.approx([-1])


def test_gigpo_without_weight_of_turns_is_grpo() -> None:
    group = [episode(1.0, turns=(1, 3)), episode(0.0, turns=(2,)), episode(0.0, turns=(1, 1, 1))]
    of_turns = advantages([group], "gigpo", omega=0.0)
    of_episodes = advantages([group], "grpo")
    for turns, of_episode in zip(of_turns[0], of_episodes[0], strict=True):
        assert turns == [of_episode] * len(turns)


numbers = st.floats(-3, 3)
turns_of_groups = st.lists(
    st.lists(st.tuples(numbers, st.sampled_from("abc")), min_size=1, max_size=5),
    min_size=2,
    max_size=5,
)


@given(turns_of_groups, st.floats(0, 1), st.booleans())
def test_advantages_of_turns_are_those_of_their_definitions(
    group: list[list[tuple[float, str]]], gamma: float, std: bool
) -> None:
    rewards = [np.array([reward for reward, _ in turns]) for turns in group]
    states = [[state for _, state in turns] for turns in group]
    returns = [
        [sum(gamma ** (s - t) * r[s] for s in range(t, len(r))) for t in range(len(r))]
        for r in rewards
    ]
    places = [(i, t) for i, r in enumerate(rewards) for t in range(len(r))]

    def relative(value: float, others: list[float]) -> float:
        deviation = np.std(others) if std else 1.0
        return float((value - np.mean(others)) / deviation) if deviation > 1e-8 else 0.0

    everyone = [returns[i][t] for i, t in places]
    totals = [float(r.sum()) for r in rewards]
    found = turn_returns(rewards, gamma=gamma, std=std)
    compared = gigpo(np.array(totals), rewards, states, gamma=gamma, omega=0.7, std=std)
    for i, t in places:
        assert found[i][t] == pytest.approx(relative(returns[i][t], everyone), abs=1e-6)
        alike = [returns[j][u] for j, u in places if states[j][u] == states[i][t]]
        expected = relative(totals[i], totals) + 0.7 * relative(returns[i][t], alike)
        assert compared[i][t] == pytest.approx(expected, abs=1e-6)


def test_advantages_of_turns_need_turns() -> None:
    bare = Trajectory(sequences=[], reward=1.0, turns=2)
    for name in ("gigpo", "turn_returns"):
        with pytest.raises(ValueError, match=r"turn_rewards and turn_states, or set trainer\.adv"):
            advantages([[bare, bare]], name)


# ── a whole batch ────────────────────────────────────────────────────────────────────────────


def test_reinforce_by_hand() -> None:
    groups = [[episode(1.0), episode(0.0)], [episode(3.0), episode(0.0)]]
    assert advantages(groups, "reinforce", baseline="none") == [[1, 0], [3, 0]]
    assert advantages(groups, "reinforce") == [[0, -1], [2, -1]]
    assert advantages(groups, "reinforce", baseline="group") == [[0.5, -0.5], [1.5, -1.5]]
    assert advantages([[episode(1.0)], [episode(0.0)]], "reinforce") == [[0.5], [-0.5]]


def test_reinforce_plus_plus_whitens_over_the_tokens_of_the_batch() -> None:
    # 3 tokens with reward 1, 1 with reward -3: mean 0, deviation sqrt(3)
    groups = [[episode(1.0, turns=(1, 2))], [episode(-3.0, turns=(1,))]]
    root = math.sqrt(3)
    assert advantages(groups, "reinforce_pp") == [
        [pytest.approx(1 / root)],
        [pytest.approx(-3 / root)],
    ]


def test_whitened_advantages_have_mean_zero_and_deviation_one_over_tokens() -> None:
    rng = np.random.default_rng(0)
    groups = [
        [episode(float(rng.normal()), turns=tuple(rng.integers(1, 5, 3))) for _ in range(4)]
        for _ in range(3)
    ]
    for name in ("turn_returns", "grpo", "gigpo", "reinforce"):
        computed = advantages(groups, name, whiten=True)
        tokens = []
        for of_group, group in zip(computed, groups, strict=True):
            for of_episode, trajectory in zip(of_group, group, strict=True):
                turns = trajectory.sequences[0].turns
                of_turns = np.broadcast_to(of_episode, 3)
                tokens += [of_turns[turn] for turn in turns if turn >= 0]
        assert np.mean(tokens) == pytest.approx(0, abs=1e-9)
        assert np.std(tokens) == pytest.approx(1)


def test_whitening_what_is_equal_gives_zeros() -> None:
    assert advantages([[episode(1.0)], [episode(1.0)]], "reinforce_pp") == [[0.0], [0.0]]


def test_the_clip_is_last() -> None:
    groups = [[episode(0.0), episode(0.0), episode(0.0), episode(1.0)]]
    assert advantages(groups, "grpo", clip=1.5)[0][3] == 1.5
    assert advantages(groups, "dr_grpo", whiten=True, clip=0.5)[0] == [-0.5, -0.5, -0.5, 0.5]


def test_a_function_of_one_groups_rewards_will_do() -> None:
    groups = [[episode(1.0), episode(2.0)], [episode(5.0)]]
    doubled = per_group(lambda rewards: 2 * rewards)(groups)
    assert [[float(a) for a in group] for group in doubled] == [[2, 4], [10]]
