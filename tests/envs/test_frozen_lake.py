import pytest

from flash.envs.frozen_lake import FrozenLakeTextEnv
from flash.types import Task


def play(env, seed, actions):
    env.reset(seed=seed)
    return [env.step(action) for action in actions]


def test_the_demonstrated_way_reaches_the_goal_on_every_map():
    env = FrozenLakeTextEnv(size=5)
    for seed in range(30):
        actions = [turn.action for turn in env.demonstrate(Task(seed))]
        *before, last = play(env, seed, actions)
        assert all(not (terminated or truncated) for _, _, terminated, truncated, _ in before)
        _, reward, terminated, truncated, info = last
        assert (reward, terminated, truncated, info["success"]) == (1.0, True, False, True)


def test_the_seed_decides_the_map_and_the_splits_share_none():
    train, heldout = FrozenLakeTextEnv(split="train"), FrozenLakeTextEnv(split="heldout")

    def maps(env):
        seen = set()
        for seed in range(60):
            env.reset(seed=seed)
            seen.add(tuple(env._rows))
        return seen

    assert maps(train) == maps(train)
    assert len(maps(train)) > 30
    assert not maps(train) & maps(heldout)


def test_an_unknown_action_costs_a_turn_and_moves_nothing():
    env = FrozenLakeTextEnv(max_turns=2)
    start, _ = env.reset(seed=1)
    text, reward, terminated, truncated, _ = env.step("fly")
    assert text == f"nothing happens . {start}"
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert env.step("fly")[3] is True


def test_every_word_is_in_the_vocabulary():
    env = FrozenLakeTextEnv()
    words = set(env.vocabulary())
    for seed in range(10):
        for turn in env.demonstrate(Task(seed)):
            assert set(turn.observation.text.split()) <= words
            assert turn.action in words
    env.reset(seed=0)
    assert set(env.step("fly")[0].split()) <= words


@pytest.mark.parametrize(
    ("options", "field"),
    [({"size": 1}, "size=1"), ({"ice": 0}, "ice=0"), ({"split": "test"}, "split='test'"),
     ({"max_turns": 0}, "max_turns=0")],
)  # fmt: skip
def test_bad_options_name_field_and_value(options, field):
    with pytest.raises(ValueError, match=field):
        FrozenLakeTextEnv(**options)
