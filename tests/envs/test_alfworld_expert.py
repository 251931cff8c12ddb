"""The expert wins every kind of game, knowing no more than the texts say."""

import random
from pathlib import Path

import pytest

pytest.importorskip("alfworld")

from flash.envs.alfworld import TASK_TYPES, Expert, Game, generate
from flash.envs.alfworld.expert import ParsedGoal, parse_goal
from flash.envs.alfworld.native import NativeEngine

PUBLISHED = Path(__file__).parents[3] / "shared" / "data" / "alfworld_games"


def play(game: Game, *, rng: random.Random | None = None, detours: float = 0.0) -> list[str]:
    """The expert's commands until it won; with `detours`, others get in between."""
    engine = NativeEngine()
    chance = random.Random(game.name)
    state = engine.reset(game)
    expert = Expert(game.goal, state.text, rng)
    commands: list[str] = []
    while not state.won and len(commands) < 150:
        stray = chance.random() < detours
        command = chance.choice(state.admissible) if stray else expert.act()
        state = engine.step(command)
        expert.observe(state.text, command)
        commands.append(command)
    assert state.won, f"{game.name}: {commands}"
    return commands


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_it_wins_generated_games_of_every_task_type(task_type):
    for seed in range(30):
        split = "heldout" if seed % 2 else "train"
        play(generate(seed, split=split, task_types=[task_type]))


@pytest.mark.parametrize("task_type", TASK_TYPES)
def test_it_finds_its_way_back_after_commands_of_others(task_type):
    for seed in range(30):
        game = generate(seed, task_types=[task_type], max_receptacles=8, max_objects=10)
        play(game, rng=random.Random(seed), detours=0.3)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published games are not at hand")
def test_it_wins_published_games():
    games = [Game.read(path) for path in sorted(PUBLISHED.rglob("game.tw-pddl"))]
    assert len(games) == 12
    for game in games:
        play(game)


def test_it_acts_only_on_what_the_texts_say():
    """Two rooms that look the same so far get the same command, wherever the object is."""
    intro = "you see a cabinet 2, a cabinet 1, and a countertop 1.\n\nYour task is to: x"
    expert = Expert("put some mug on countertop", intro)
    assert expert.act() == "go to cabinet 2"
    expert.observe("You arrive at cabinet 2. The cabinet 2 is closed.", "go to cabinet 2")
    assert expert.act() == "open cabinet 2"
    expert.observe(
        "You open the cabinet 2. The cabinet 2 is open. In it, you see a cup 1, and a mug 3.",
        "open cabinet 2",
    )
    assert expert.act() == "take mug 3 from cabinet 2"


def test_it_examines_a_place_that_it_stands_at_already():
    expert = Expert("put some mug on desk", "you see a shelf 2, a shelf 1, and a desk 1.")
    expert.observe("You arrive at shelf 2. On the shelf 2, you see nothing.", "go to shelf 2")
    assert expert.act() == "go to shelf 1"
    expert.observe("Nothing happens.", "go to shelf 1")
    assert expert.act() == "examine shelf 1"


@pytest.mark.parametrize(
    ("goal", "parsed"),
    [
        ("put a apple in fridge", ParsedGoal("apple", target="fridge")),
        ("put some cd on safe.", ParsedGoal("cd", target="safe")),
        ("put a clean mug in cabinet", ParsedGoal("mug", target="cabinet", verb="clean")),
        ("clean some mug and put it in desk", ParsedGoal("mug", target="desk", verb="clean")),
        ("put a hot egg in sinkbasin", ParsedGoal("egg", target="sinkbasin", verb="heat")),
        ("put a cool pan in shelf", ParsedGoal("pan", target="shelf", verb="cool")),
        ("put two pen in drawer", ParsedGoal("pen", 2, target="drawer")),
        ("find two pen and put them in drawer", ParsedGoal("pen", 2, target="drawer")),
        ("look at book under the desklamp", ParsedGoal("book", lamp="desklamp")),
        ("examine the book with the desklamp", ParsedGoal("book", lamp="desklamp")),
    ],
)
def test_goal_sentences_are_understood(goal, parsed):
    assert parse_goal(goal) == parsed


def test_an_unknown_goal_sentence_is_refused():
    with pytest.raises(ValueError, match="dance"):
        parse_goal("dance with a mug")
