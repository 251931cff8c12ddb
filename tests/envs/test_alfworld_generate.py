"""Generated games: the same everywhere, solvable, not won at the start, and split by floor plan."""

import hashlib
import json
import subprocess
import sys

import pytest

pytest.importorskip("alfworld")

from flash.envs.alfworld import HELD_OUT_PLANS, TASK_TYPES, Game, generate
from flash.envs.alfworld.native import NativeEngine

SIZES = [(None, None), (8, 10), (3, 4)]


def digest(game: Game) -> str:
    return hashlib.sha256(json.dumps(game.record()).encode()).hexdigest()


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize(("max_receptacles", "max_objects"), SIZES)
def test_every_walkthrough_wins_a_game_that_was_not_won_before(split, max_receptacles, max_objects):
    engine = NativeEngine()
    for seed in range(60):
        game = generate(seed, split=split, max_receptacles=max_receptacles, max_objects=max_objects)
        assert not engine.reset(game).won
        states = [engine.step(command) for command in game.walkthrough]
        assert [state.won for state in states] == [False] * (len(states) - 1) + [True], game.name
        assert all(state.text != "Nothing happens." for state in states), game.name


@pytest.mark.parametrize("task_type", TASK_TYPES)
@pytest.mark.parametrize("split", ["train", "heldout"])
def test_the_asked_task_type_is_made_in_both_splits(task_type, split):
    for seed in range(10):
        assert generate(seed, split=split, task_types=[task_type]).task_type == task_type


def test_splits_share_no_floor_plan():
    plans = {
        split: {generate(seed, split=split).floor_plan for seed in range(300)}
        for split in ("train", "heldout")
    }
    assert plans["heldout"] == set(HELD_OUT_PLANS)
    assert not plans["train"] & set(HELD_OUT_PLANS)
    assert len(plans["train"]) > 60


def test_seeds_make_different_games_and_the_same_seed_the_same_game():
    digests = {digest(generate(seed, max_receptacles=6)) for seed in range(200)}
    assert len(digests) == 200
    assert digest(generate(5)) == digest(generate(5))
    assert digest(generate(5)) != digest(generate(5, split="heldout"))


def test_a_game_does_not_depend_on_the_process_or_python_version():
    """Hash randomisation differs in the other process; the constant holds for every version."""
    code = (
        "from flash.envs.alfworld import generate\n"
        "import hashlib, json\n"
        "print(hashlib.sha256(json.dumps(generate(11).record()).encode()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True, text=True, check=True, timeout=60,
    ).stdout.strip()  # fmt: skip
    assert other == digest(generate(11)) == GAME_11


GAME_11 = "f86fe52379cd74c2820650c778bcabc23ad983472624e943d3e1e7a3cdd75e82"


def test_sizes_bound_the_game():
    for seed in range(50):
        problem = generate(seed, max_receptacles=6, max_objects=7).pddl_problem
        problem = problem.partition("(:goal")[0]
        assert problem.count("(receptacleType ") <= 6
        assert problem.count("(objectType ") <= 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "test"}, "split='test'"),
        ({"task_types": ["pick"]}, "task_types='pick'"),
        ({"task_types": []}, "task_types"),
        ({"task_types": "pick_two_obj_and_place"}, "list"),
        ({"max_receptacles": 2}, "max_receptacles=2"),
        ({"max_objects": 1}, "max_objects=1"),
    ],
)
def test_an_option_that_can_not_be_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=words):
        generate(0, **options)
