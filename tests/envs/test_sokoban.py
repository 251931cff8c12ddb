"""Sokoban's rooms, its rules and rewards, and what an agent may answer."""

import re
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.envs.sokoban import MOVES, Room, SokobanEnv, generate, solve
from flash.types import Task

ROOT = Path(__file__).parents[2]
MOVE = st.sampled_from([*MOVES, "up", " LEFT "])


def room(text: str) -> Room:
    """As `Room.text` writes it."""
    rows = [line.split() for line in text.strip().splitlines()]
    fields = [symbol for row in rows for symbol in row]

    def those(symbols):
        return sum(1 << number for number, symbol in enumerate(fields) if symbol in symbols)

    player = next(number for number, symbol in enumerate(fields) if symbol in "PS")
    return Room(
        size=len(rows),
        floor=those("_OX√PS"),
        targets=those("O√S"),
        boxes=those("X√"),
        player=player,
    )


CORRIDOR = room("""
    # # # # # #
    # P X O _ #
    # _ # # # #
    # _ # # # #
    # _ # # # #
    # # # # # #
""")


def in_room(start: Room, **options) -> SokobanEnv:
    env = SokobanEnv(**options)
    env.reset(seed=0)
    env._room = start
    return env


def fewest_pushes(start: Room) -> int:
    """By trying all moves, a push at a time: a reference that shares nothing with the generator."""
    here, pushes, seen = {start}, 0, set()
    while here:
        walked, new = set(here), here
        while new:
            new = {there for r in new for m in MOVES if (there := r.after(m)).boxes == r.boxes}
            new -= walked
            walked |= new
        if any(r.solved for r in walked):
            return pushes
        seen |= walked
        here = {there for r in walked for m in MOVES if (there := r.after(m)).boxes != r.boxes}
        here, pushes = here - seen, pushes + 1
    raise AssertionError("it can't be solved")


@pytest.mark.parametrize(("size", "boxes", "rooms"), [(5, 1, 60), (6, 1, 60), (7, 2, 10)])
def test_every_room_needs_as_many_pushes_as_were_asked_for(size, boxes, rooms):
    for seed in range(rooms):
        made = generate(seed, size, boxes, 2, 4, "train")
        assert made.boxes.bit_count() == made.targets.bit_count() == boxes
        assert 2 <= fewest_pushes(made) <= 4


def test_the_solver_finds_the_fewest_moves_and_knows_what_is_lost():
    for seed in range(20):
        start = generate(seed, 6, 2, 3, 6, "train")
        layer, seen, moves = {start}, {start}, 0
        while not any(r.solved for r in layer):
            layer, moves = {r.after(move) for r in layer for move in MOVES} - seen, moves + 1
            seen |= layer
        assert len(solve(start)) == moves
    assert solve(CORRIDOR) == ["Right"]
    lost = CORRIDOR.after("Right").after("Right")
    assert lost.text().splitlines()[1] == "# _ _ S X #"
    assert solve(lost) is None


def test_a_box_is_pushed_and_never_pulled_nor_through_what_is_in_the_way():
    two = room("# # # # # #\n# P X X _ #\n# O _ _ O #\n# # # # # #\n# # # # # #\n# # # # # #")
    assert two.after("Right") is two  # two at once
    assert two.after("Up") is two
    pushed = two.after("Down").after("Right").after("Up")
    assert pushed is not two and pushed.text().splitlines()[1] == "# _ X X _ #"  # a wall behind
    back = CORRIDOR.after("Right").after("Left")
    assert back.text().splitlines()[1] == "# P _ √ _ #"


def test_rewards_are_gym_sokobans():
    solves = in_room(CORRIDOR).step("Right")
    assert solves[1:4] == (pytest.approx(-0.1 + 1 + 10), True, False)
    assert solves[4]["success"] is True
    wall = in_room(CORRIDOR).step("Left")
    assert wall[1:4] == (pytest.approx(-0.1), False, False)
    two = room("# # # # # #\n# P √ _ _ #\n# _ # # # #\n# _ X O _ #\n# _ # # # #\n# # # # # #")
    assert in_room(two).step("Right")[1] == pytest.approx(-0.1 - 1)
    assert in_room(two).step("Down || Down || Right")[1] == pytest.approx(-0.3 + 1 + 10)
    only = in_room(CORRIDOR, rewards="success")
    assert [only.step("Left")[1], only.step("Right")[1]] == [0.0, 1.0]


def test_what_follows_the_end_or_a_word_that_is_no_move_is_not_played():
    assert in_room(CORRIDOR).step("Right || Right")[4]["success"] is True
    env = in_room(CORRIDOR)
    text, reward, terminated, _, info = env.step("Left || fly || Right")
    assert text == f"That is no move.\n{CORRIDOR.text()}"
    assert (reward, terminated, info["success"]) == (pytest.approx(-0.2), False, False)


def test_moves_are_counted_up_to_max_steps_in_one_answer_or_several():
    env = in_room(CORRIDOR, max_steps=3)
    assert env.step("Left || Left")[3] is False
    _, reward, terminated, truncated, _ = env.step("Down || Up || Right")
    assert (reward, terminated, truncated) == (pytest.approx(-0.1), False, True)
    assert in_room(CORRIDOR, max_steps=1).step("Right")[2:4] == (True, False)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(), st.lists(MOVE).map("||".join)), max_size=8), st.integers(0, 9))
def test_whatever_is_said_gets_an_answer_and_a_bounded_reward(said, seed):
    env = SokobanEnv(max_steps=6)
    text, _ = env.reset(seed=seed)
    assert text in env.observation_space
    total, steps = 0.0, 0
    for action in said:
        text, reward, terminated, truncated, info = env.step(action)
        total, steps = total + reward, env._steps
        assert text in env.observation_space
        assert info["success"] is terminated
        assert not (terminated and truncated)
        assert truncated is (steps == 6 and not terminated)
        if terminated or truncated:
            break
    assert -0.1 * 6 - 3 <= total <= 11
    assert steps <= 6


def test_a_huge_answer_is_played_to_the_last_step_and_no_further():
    _, reward, _, truncated, _ = in_room(CORRIDOR, max_steps=20).step("Left||" * 100_000)
    assert (reward, truncated) == (pytest.approx(-2.0), True)


def test_a_room_belongs_to_one_split():
    def rooms(split):
        return {generate(seed, 5, 1, 1, 2, split).text() for seed in range(150)}

    assert len(rooms("train")) > 100
    assert not rooms("train") & rooms("heldout")


def test_another_process_makes_the_same_rooms_and_demonstrations():
    code = (
        "from flash.envs.sokoban import SokobanEnv; from flash.types import Task\n"
        "env = SokobanEnv(size=7, boxes=2, wander=0.3)\n"
        "turns = [turn for seed in range(5) for turn in env.demonstrate(Task(seed))]\n"
        "print([[turn.observation.text, turn.action] for turn in turns])"
    )
    env = SokobanEnv(size=7, boxes=2, wander=0.3)
    here = [[t.observation.text, t.action] for s in range(5) for t in env.demonstrate(Task(s))]
    there = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert there.stdout.strip() == str(here)


@pytest.mark.parametrize("wander", [0.0, 0.4])
def test_demonstrations_end_with_all_boxes_on_targets_in_words_of_the_vocabulary(wander):
    env = SokobanEnv(wander=wander, max_steps=100)
    rules, *words = [word.split() for word in env.vocabulary()]
    known = {word for phrase in [rules, *words] for word in phrase}
    lengths = []
    for seed in range(20):
        turns = env.demonstrate(Task(seed))
        lengths.append(len(turns))
        env.reset(seed=seed)
        for turn in turns:
            *_, info = env.step(turn.action)
            assert set(turn.observation.text.split()) <= known
        assert info["success"] is True
    if not wander:
        assert lengths == [len(solve(generate(s, 6, 1, 1, 10, "train"))) for s in range(20)]


def test_words_tell_each_box_from_you_each_free_target_from_it_and_what_is_near():
    start = room("""
        # # # # # #
        # O _ _ # #
        # _ _ X P #
        # _ _ _ _ #
        # √ _ _ _ #
        # # # # # #
    """)
    env = in_room(start, boxes=2, observation="words")
    assert start.words().splitlines() == [
        "box same row 1 left",
        "target 1 up 2 left",
        "up floor down floor left floor right you",
        "box 2 down 3 left",
        "target 3 up same column",
        "up floor down wall left wall right floor",
        "you up wall down floor left box right wall",
    ]
    text, *_ = env.step("fly")
    assert text == f"That is no move.\n{start.words()}"
    text, *_ = env.step("Left")
    assert text.splitlines()[:2] == ["box same row 1 left", "target 1 up 1 left"]
    assert text in env.observation_space


@pytest.mark.parametrize("size", [5, 12])
def test_the_words_of_every_room_are_phrases_of_the_vocabulary(size):
    env = SokobanEnv(size=size, boxes=2, observation="words")
    known = sorted(env.vocabulary(), key=len, reverse=True)
    phrases = re.compile("|".join(map(re.escape, known)), re.IGNORECASE)
    for seed in range(20):
        for turn in env.demonstrate(Task(seed)):
            assert not phrases.sub("", turn.observation.text).split()
            assert turn.observation.text in env.observation_space


def test_gymnasium_makes_it():
    env = gymnasium.make("flash/Sokoban-v0", size=5)
    assert env.reset(seed=1)[1]["admissible_commands"] == list(MOVES)


@pytest.mark.parametrize(
    ("options", "told"),
    [({"size": 5.5}, "size=5.5 must be a whole"), ({"size": 4}, "size=4"),
     ({"boxes": 5}, "boxes=5"), ({"min_pushes": 0}, "min_pushes=0"),
     ({"min_pushes": 9, "max_pushes": 3}, "max_pushes=3"), ({"rewards": "no"}, "rewards='no'"),
     ({"observation": "json"}, "observation='json'"),
     ({"split": "test"}, "split='test'"), ({"max_steps": 0}, "max_steps=0"),
     ({"wander": 1}, "wander=1"),
     ({"size": 5, "min_pushes": 60, "max_pushes": 60}, "min_pushes=60")],
)  # fmt: skip
def test_options_that_cant_be_are_told_before_anything_is_played(options, told):
    with pytest.raises(ValueError, match=told):
        SokobanEnv(**options)
