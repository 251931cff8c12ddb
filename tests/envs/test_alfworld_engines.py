"""The native engine and TextWorld's, side by side: what lets the native one be the default."""

import importlib.util
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from flash.envs.alfworld.engine import State
from flash.envs.alfworld.game import TASK_TYPES, Game
from flash.envs.alfworld.native import NativeEngine

needs_alfworld = pytest.mark.skipif(
    importlib.util.find_spec("alfworld") is None or importlib.util.find_spec("textworld") is None,
    reason="needs the real engine: pip install 'flash-rl[alfworld]'",
)
pytestmark = needs_alfworld

RELEASED_GAMES = Path(__file__).parents[2].parent / "shared" / "data" / "alfworld_games"
NONSENSE = (
    "", "   ", "dance", "go", "go to", "go to desk 99", "GO TO CABINET 1", "Look", "look.",
    "look around", "take  apple 1 from fridge 1", "take apple 1", "examine", "move to",
    "help me", "put apple 1 in/on fridge 1", "take apple 1 from countertop 1", "öffne fridge 1",
    "open fridge 1; look", "inventory inventory", "{r}", "#look.feedback#",
)  # fmt: skip
PADDED = ("  look  ", "\tinventory", "help\n", "look \n")
ONE_FAST = [
    pytest.param(task_type, marks=[pytest.mark.slow] if number else [])
    for number, task_type in enumerate(TASK_TYPES)
]


@pytest.fixture(scope="module")
def textworld():
    from flash.envs.alfworld.textworld_engine import TextWorldEngine  # noqa: PLC0415

    engine = TextWorldEngine()
    yield engine
    engine.close()


@pytest.fixture(params=["native", "textworld"])
def engine(request):
    """Both engines, one after the other, for expectations written by hand."""
    return NativeEngine() if request.param == "native" else request.getfixturevalue("textworld")


# ── the differential test ────────────────────────────────────────────────────────────────────


class Walker:
    """Chooses commands so that rare states come up: by verb first, and with errors mixed in."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.seen: dict[str, None] = {}

    def choose(self, state: State) -> str:
        rng = self.rng
        self.seen.update(dict.fromkeys(state.admissible))
        kind = rng.random()
        if kind < 0.06:
            return rng.choice(NONSENSE + PADDED)
        if kind < 0.14:  # possible at another time or place
            return rng.choice(list(self.seen))
        if kind < 0.18:
            return rng.choice([str.upper, str.title, str.swapcase])(rng.choice(state.admissible))
        if kind < 0.30:  # where heat, cold, water, light and knives are
            places = [c for c in state.admissible if c.startswith("go to") and _useful(c)]
            if places:
                return rng.choice(places)
        verbs = sorted({c.split()[0] for c in state.admissible})
        if kind < 0.55:  # what changes the world
            verbs = [v for v in verbs if v not in {"look", "help", "inventory", "examine"}]
        verb = rng.choice(verbs)
        return rng.choice([c for c in state.admissible if c.split()[0] == verb])


def _useful(command: str) -> bool:
    words = ("sink", "microwave", "fridge", "desk", "sidetable", "countertop", "dresser", "shelf")
    return any(word in command for word in words)


def play_side_by_side(native, real, game, commands):
    """Plays both; `commands` is a list, or a function from a state to the next or None."""
    expected, actual = real.reset(game), native.reset(game)
    assert actual == expected, game.name
    history = []
    remaining = iter(commands) if not callable(commands) else None
    while True:
        command = commands(actual) if remaining is None else next(remaining, None)
        if command is None:
            return actual, history
        history.append(command)
        expected, actual = real.step(command), native.step(command)
        assert actual == expected, (game.name, history)


def walk(seed, num_steps):
    walker = Walker(seed)
    steps = iter(range(num_steps))
    return lambda state: walker.choose(state) if next(steps, None) is not None else None


def released_games(task_type):
    if not RELEASED_GAMES.is_dir():
        pytest.skip("the released ALFWorld games are not beside this checkout")
    paths = sorted(RELEASED_GAMES.glob(f"{task_type}-*/*/game.tw-pddl"))
    assert paths
    return [Game.read(path) for path in paths]


def generated_games(task_type):
    from flash.envs.alfworld.generate import generate  # noqa: PLC0415

    whole = [generate(0, split=split, task_types=[task_type]) for split in ("train", "heldout")]
    small = [
        generate(seed, task_types=[task_type], max_receptacles=8, max_objects=10)
        for seed in range(100, 103)
    ]
    return whole + small


@pytest.mark.parametrize("task_type", ONE_FAST)
def test_the_engines_agree_on_released_games(textworld, task_type):
    for number, game in enumerate(released_games(task_type)):
        native = NativeEngine()
        state, _ = play_side_by_side(native, textworld, game, game.walkthrough)
        assert state.won and state.done and state.reward == 1.0
        play_side_by_side(native, textworld, game, walk(number, 120))


@pytest.mark.parametrize("task_type", ONE_FAST)
def test_the_engines_agree_on_generated_games(textworld, task_type):
    verbs = set()
    for number, game in enumerate(generated_games(task_type)):
        native = NativeEngine()
        state, _ = play_side_by_side(native, textworld, game, game.walkthrough)
        assert state.won and state.reward == 1.0
        _, history = play_side_by_side(native, textworld, game, walk(number, 100))
        verbs |= {command.split()[0] for command in history if command.strip()}
    assert {"go", "take", "move", "examine", "open", "close"} <= verbs


def test_the_engines_agree_after_the_end_too(textworld):
    game = generated_games("pick_heat_then_place_in_recep")[-1]
    play_side_by_side(
        NativeEngine(),
        textworld,
        game,
        [*game.walkthrough, *undo(game), "look", "dance", *game.walkthrough],
    )


def undo(game):
    obj, _, receptacle = game.walkthrough[-1].removeprefix("move ").partition(" to ")
    return [f"take {obj} from {receptacle}", "inventory", game.walkthrough[-1]]


@pytest.mark.slow
def test_both_engines_equal_the_package_as_shipped(textworld, tmp_path):
    game = generated_games("pick_clean_then_place_in_recep")[1]
    game.write(tmp_path / "game.tw-pddl")
    native = NativeEngine()
    state, commands, walker = native.reset(game), list(game.walkthrough), Walker(5)
    states = [state]
    for number in range(len(commands) + 40):
        if number >= len(commands):
            commands.append(walker.choose(state))
        state = native.step(commands[number])
        states.append(state)
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("shipped_alfworld.py"),
            tmp_path / "game.tw-pddl",
        ],
        input=json.dumps(commands),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shipped = [State(t, tuple(a), float(r), w) for t, a, r, w in json.loads(done.stdout)]
    assert states == shipped
    assert [textworld.reset(game), *map(textworld.step, commands)] == shipped


def test_threads_playing_native_games_disturb_nobody():
    games = [game for task_type in TASK_TYPES for game in generated_games(task_type)[2:]]
    games *= 2  # so that two threads also share one game

    def transcript(number):
        engine, walker = NativeEngine(), Walker(number)
        state = engine.reset(games[number])
        states = [state]
        for _ in range(60):
            state = engine.step(walker.choose(state))
            states.append(state)
        return states

    serial = [transcript(number) for number in range(len(games))]
    with ThreadPoolExecutor(max_workers=8) as pool:
        assert list(pool.map(transcript, range(len(games)))) == serial


# ── the rules and their quirks, written by hand; each must hold in both engines ──────────────


def package_text(name):
    [folder] = importlib.util.find_spec("alfworld").submodule_search_locations
    return (Path(folder) / "data" / name).read_text()


GOAL_APPLE_ON_TABLE = """(and (exists (?r - receptacle) (exists (?o - object) (and
    (inReceptacle ?o ?r) (objectType ?o AppleType) (receptacleType ?r DiningTableType)))))"""
GOAL_TWO_APPLES = """(and (exists (?r - receptacle) (exists (?o1 - object) (and
    (objectType ?o1 AppleType) (receptacleType ?r DiningTableType) (inReceptacle ?o1 ?r)
    (exists (?o2 - object) (and (not (= ?o1 ?o2)) (objectType ?o2 AppleType)
    (receptacleType ?r DiningTableType) (inReceptacle ?o2 ?r)))))))"""


def kitchen(goal=GOAL_APPLE_ON_TABLE, *, task="put some apple on diningtable", facts=""):
    """A room to know by heart: the table and the bin share a place, the rest stand alone.

    table: apple 2 (a), apple 1 (b), desklamp, mug      fridge (closed): egg
    bin, microwave (closed), sink basin, sink, armchair: empty      counter: knife
    """
    return Game(
        name="kitchen",
        pddl_domain=package_text("alfred.pddl"),
        grammar=package_text("alfred.twl2").replace("UNKNOWN GOAL", task),
        pddl_problem=f"""(define (problem kitchen) (:domain alfred) (:objects
        agent1 - agent
        AppleType EggType MugType KnifeType ButterKnifeType DeskLampType - otype
        DiningTableType GarbageCanType FridgeType MicrowaveType SinkBasinType SinkType - rtype
        ArmChairType CounterTopType - rtype
        Apple_bar_a Apple_bar_b Egg_bar_a Mug_bar_a Knife_bar_a DeskLamp_bar_a - object
        DiningTable_bar_a GarbageCan_bar_a Fridge_bar_a Microwave_bar_a - receptacle
        Sink_bar_a_bar_SinkBasin Sink_bar_b ArmChair_bar_a CounterTop_bar_a - receptacle
        loc_bar_0 loc_bar_1 loc_bar_2 loc_bar_3 loc_bar_4 loc_bar_5 loc_bar_6 loc_bar_7 - location)
        (:init (atLocation agent1 loc_bar_0)
        (receptacleAtLocation DiningTable_bar_a loc_bar_1)
        (receptacleAtLocation GarbageCan_bar_a loc_bar_1)
        (receptacleAtLocation Fridge_bar_a loc_bar_2)
        (receptacleAtLocation Microwave_bar_a loc_bar_3)
        (receptacleAtLocation Sink_bar_a_bar_SinkBasin loc_bar_4)
        (receptacleAtLocation Sink_bar_b loc_bar_5)
        (receptacleAtLocation ArmChair_bar_a loc_bar_6)
        (receptacleAtLocation CounterTop_bar_a loc_bar_7)
        (receptacleType DiningTable_bar_a DiningTableType)
        (receptacleType GarbageCan_bar_a GarbageCanType)
        (receptacleType Fridge_bar_a FridgeType) (receptacleType Microwave_bar_a MicrowaveType)
        (receptacleType Sink_bar_a_bar_SinkBasin SinkBasinType)
        (receptacleType Sink_bar_b SinkType) (receptacleType ArmChair_bar_a ArmChairType)
        (receptacleType CounterTop_bar_a CounterTopType)
        (openable Fridge_bar_a) (openable Microwave_bar_a)
        (canContain DiningTableType AppleType) (canContain GarbageCanType AppleType)
        (canContain MicrowaveType AppleType) (canContain FridgeType EggType)
        (objectType Apple_bar_a AppleType) (objectType Apple_bar_b AppleType)
        (objectType Egg_bar_a EggType) (objectType Mug_bar_a MugType)
        (objectType Knife_bar_a KnifeType) (objectType DeskLamp_bar_a DeskLampType)
        (pickupable Apple_bar_a) (pickupable Apple_bar_b) (pickupable Egg_bar_a)
        (pickupable Mug_bar_a) (pickupable Knife_bar_a)
        (cleanable Apple_bar_a) (heatable Apple_bar_a) (coolable Apple_bar_a)
        (sliceable Apple_bar_a) (isReceptacleObject Mug_bar_a) (toggleable DeskLamp_bar_a)
        (inReceptacle Apple_bar_a DiningTable_bar_a) (objectAtLocation Apple_bar_a loc_bar_1)
        (inReceptacle Apple_bar_b DiningTable_bar_a) (objectAtLocation Apple_bar_b loc_bar_1)
        (inReceptacle Mug_bar_a DiningTable_bar_a) (objectAtLocation Mug_bar_a loc_bar_1)
        (inReceptacle DeskLamp_bar_a DiningTable_bar_a)
        (objectAtLocation DeskLamp_bar_a loc_bar_1)
        (inReceptacle Egg_bar_a Fridge_bar_a) (objectAtLocation Egg_bar_a loc_bar_2)
        (inReceptacle Knife_bar_a CounterTop_bar_a) (objectAtLocation Knife_bar_a loc_bar_7)
        {facts}) (:goal {goal}))""",
    )


# Within reach, or the real engine would not load the game, and fulfilled by no test.
UNMET = GOAL_APPLE_ON_TABLE.replace("DiningTableType", "MicrowaveType")


def texts(engine, game, *commands):
    engine.reset(game)
    return [engine.step(command).text for command in commands]


def test_the_intro_alone_lists_every_receptacle_with_a_before_vowels_too(engine):
    assert engine.reset(kitchen()).text == (
        "-= Welcome to TextWorld, ALFRED! =-\n\n"
        "You are in the middle of a room. Looking quickly around you, you see a armchair 1, "
        "a countertop 1, a diningtable 1, a fridge 1, a garbagecan 1, a microwave 1, "
        "a sinkbasin 1, and a sink 1.\n\nYour task is to: put some apple on diningtable."
    )
    assert engine.step("look").text == (
        "You are in the middle of a room. Looking quickly around you, you see nothing."
    )


def test_only_what_is_held_can_be_examined(engine):
    engine.reset(kitchen(UNMET))
    state = engine.step("go to diningtable 1")
    assert state.text == (
        "You arrive at diningtable 1. On the diningtable 1, you see a apple 2, a apple 1, "
        "a desklamp 1, and a mug 1."
    )
    assert "examine apple 1" not in state.admissible
    assert engine.step("examine apple 1").text == "Nothing happens."
    assert engine.step("take apple 2 from diningtable 1").text == (
        "You pick up the apple 2 from the diningtable 1."
    )
    assert engine.step("examine apple 2").text == "There's nothing special about apple 2."
    assert engine.step("inventory").text == "You are carrying: a apple 2."
    assert engine.step("take apple 1 from diningtable 1").text == "Nothing happens."


def test_going_where_one_stands_does_nothing(engine):
    there = "You arrive at garbagecan 1. On the garbagecan 1, you see nothing."
    assert texts(
        engine,
        kitchen(UNMET),
        "go to garbagecan 1",
        "go to garbagecan 1",
        "go to diningtable 1",  # at the same place
        "look",
    ) == [
        there,
        "Nothing happens.",
        "Nothing happens.",
        "You are facing the diningtable 1, and garbagecan 1. Next to it, you see nothing.",
    ]


def test_a_thing_moved_within_a_place_then_lies_next_to_it(engine):
    assert texts(
        engine,
        kitchen(UNMET),
        "go to diningtable 1",
        "take apple 1 from diningtable 1",
        "move apple 1 to garbagecan 1",
        "look",
        "examine garbagecan 1",
    )[2:] == [
        "You move the apple 1 to the garbagecan 1.",
        "You are facing the diningtable 1, and garbagecan 1. Next to it, you see a apple 1.",
        "On the garbagecan 1, you see a apple 1.",
    ]


def test_closed_doors_keep_nothing_from_heating_or_cooling(engine):
    take = ("go to diningtable 1", "take apple 2 from diningtable 1")
    assert texts(
        engine,
        kitchen(UNMET),
        *take,
        "go to microwave 1",
        "heat apple 2 with microwave 1",
        "examine apple 2",
        "move apple 2 to microwave 1",
        "go to fridge 1",
        "cool apple 2 with fridge 1",
        "examine apple 2",
        "open fridge 1",
        "close fridge 1",
        "examine fridge 1",
    )[2:] == [
        "You arrive at microwave 1. The microwave 1 is closed.",
        "You heat the apple 2 using the microwave 1.",
        "This is a hot apple 2.",
        "Nothing happens.",
        "You arrive at fridge 1. The fridge 1 is closed.",
        "You cool the apple 2 using the fridge 1.",
        "This is a cold apple 2.",
        "You open the fridge 1. The fridge 1 is open. In it, you see a egg 1.",
        "You close the fridge 1.",
        "The fridge 1 is closed.",
    ]


def test_a_sink_cleans_only_where_the_game_s_own_domain_says_so(engine):
    commands = (
        "go to diningtable 1",
        "take apple 2 from diningtable 1",
        "go to sink 1",
        "clean apple 2 with sink 1",
        "go to sinkbasin 1",
        "clean apple 2 with sinkbasin 1",
        "examine apple 2",
    )
    packaged = kitchen(UNMET)
    released = replace(
        packaged,
        pddl_domain=packaged.pddl_domain.replace(";(receptacleType ?r SinkType)", "", 1).replace(
            "(receptacleType ?r SinkBasinType)",
            "(receptacleType ?r SinkType) (receptacleType ?r SinkBasinType)",
        ),
    )
    clean = "You clean the apple 2 using the sinkbasin 1."
    assert texts(engine, packaged, *commands)[3::2] == ["Nothing happens.", clean]
    assert texts(engine, released, *commands)[3::2] == [
        "You clean the apple 2 using the sink 1.",
        clean,
    ]
    assert engine.step("examine apple 2").text == "This is a clean apple 2."


def test_a_lamp_once_on_stays_on(engine):
    assert texts(
        engine, kitchen(UNMET), "use desklamp 1", "go to diningtable 1", *["use desklamp 1"] * 2
    ) == [
        "Nothing happens.",
        "You arrive at diningtable 1. On the diningtable 1, you see a apple 2, a apple 1, "
        "a desklamp 1, and a mug 1.",
        "You turn on the desklamp 1.",
        "You turn on the desklamp 1.",
    ]


def test_a_held_knife_slices_what_lies_at_the_place(engine):
    # The apple has to be where the knife can be taken: it starts at the table, so say so.
    game = kitchen(UNMET, facts="(objectAtLocation Apple_bar_a loc_bar_7)")
    assert texts(
        engine,
        game,
        "go to countertop 1",
        "slice apple 2 with knife 1",
        "take knife 1 from countertop 1",
        "slice apple 2 with knife 1",
        "slice apple 1 with knife 1",
    )[1:] == [
        "Nothing happens.",
        "You pick up the knife 1 from the countertop 1.",
        "You sliced the apple 2 with the knife 1.",
        "Nothing happens.",
    ]


def test_a_mug_is_looked_into(engine):
    assert texts(
        engine,
        kitchen(UNMET),
        "go to diningtable 1",
        "take mug 1 from diningtable 1",
        "examine mug 1",
    )[2] == ("This is a normal mug 1. In it, you see nothing.")


def test_the_file_s_own_templates_word_the_commands(engine):
    game = kitchen(UNMET)
    grammar = game.grammar.replace('"move {o} to {r}"', '"put {o} in/on {r}"')
    grammar = grammar.replace("You move the {o.name} to the", "You put the {o.name} in/on the")
    assert grammar != game.grammar
    assert texts(
        engine,
        replace(game, grammar=grammar),
        "go to diningtable 1",
        "take apple 1 from diningtable 1",
        "move apple 1 to garbagecan 1",
        "put apple 1 in/on garbagecan 1",
    )[2:] == ["Nothing happens.", "You put the apple 1 in/on the garbagecan 1."]


def test_a_task_text_ends_where_textworld_stops_reading(engine):
    game = kitchen(task="put the apple away; it's 50% <rotten>")
    assert engine.reset(game).text.endswith("Your task is to: put the apple away")


def test_space_around_a_command_is_ignored_and_case_is_not(engine):
    assert texts(engine, kitchen(UNMET), "  inventory\n", "Inventory", "", "go  to fridge 1") == [
        "You are not carrying anything.",
        "Nothing happens.",
        "Nothing happens.",
        "Nothing happens.",
    ]


def test_commands_are_sorted_and_complete(engine):
    engine.reset(kitchen(UNMET))
    engine.step("go to diningtable 1")
    assert engine.step("take apple 2 from diningtable 1").admissible == (
        "examine apple 2",
        "examine diningtable 1",
        "examine garbagecan 1",
        "go to armchair 1",
        "go to countertop 1",
        "go to fridge 1",
        "go to microwave 1",
        "go to sink 1",
        "go to sinkbasin 1",
        "help",
        "inventory",
        "look",
        "move apple 2 to diningtable 1",
        "move apple 2 to garbagecan 1",
        "use desklamp 1",
    )


def test_reward_is_one_while_the_goal_holds(engine):
    assert engine.reset(kitchen()).won  # the apples are on the table already
    game = kitchen(GOAL_TWO_APPLES)
    assert engine.reset(game).reward == 1.0
    engine.step("go to diningtable 1")
    state = engine.step("take apple 1 from diningtable 1")
    assert (state.reward, state.won, state.done) == (0.0, False, False)
    assert engine.step("dance").reward == 0.0
    state = engine.step("move apple 1 to diningtable 1")
    assert (state.reward, state.won, state.done) == (1.0, True, True)
    assert engine.step("dance").reward == 1.0


def test_a_lamp_and_a_held_thing_win_the_look_task_in_either_order(engine):
    goal = """(and (exists (?ot - object ?r - receptacle ?a - agent ?l - location) (and
        (objectType ?ot DeskLampType) (toggleable ?ot) (isToggled ?ot) (receptacleAtLocation ?r ?l)
        (atLocation ?a ?l) (inReceptacle ?ot ?r))) (exists (?o - object ?a - agent)
        (and (objectType ?o AppleType) (holds ?a ?o))))"""
    game = kitchen(goal)
    assert game.task_type == "look_at_obj_in_light"
    light, take = "use desklamp 1", "take apple 1 from diningtable 1"
    for first, second in ((light, take), (take, light)):
        engine.reset(game)
        engine.step("go to diningtable 1")
        assert not engine.step(first).won
        assert engine.step(second).won
        assert not engine.step("go to fridge 1").won  # away from the lamp


def test_comments_costs_and_metrics_in_a_problem_change_nothing(engine):
    game = kitchen(UNMET)
    expected = engine.reset(game)
    problem = game.pddl_problem.replace("(:init", "(:init ; here we go (again)\n(= (total-cost) 0)")
    problem = problem.rstrip().removesuffix(")") + "(:metric minimize (total-cost)))"
    assert engine.reset(replace(game, pddl_problem=problem)) == expected


def test_a_reset_leaves_nothing_of_the_episode_before(engine):
    game = kitchen(UNMET)
    first = engine.reset(game)
    engine.step("go to diningtable 1")
    engine.step("take apple 1 from diningtable 1")
    assert engine.reset(game) == first
    assert engine.step("inventory").text == "You are not carrying anything."


# ── what the native engine refuses, instead of playing it wrongly ────────────────────────────


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"pddl_domain": "(define (domain alfred) (:action fly))"}, "PDDL domain"),
        ({"pddl_problem": "(define)"}, "PDDL problem"),
        ({"grammar": ""}, "no 'action look' block"),
    ],
)
def test_a_file_that_is_not_understood_is_refused_by_name(change, complaint):
    with pytest.raises(ValueError, match=f"'kitchen'.*{complaint}"):
        NativeEngine().reset(replace(kitchen(), **change))


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("(openable Fridge_bar_a)", "(shiny Fridge_bar_a)", "'shiny fridge_bar_a'"),
        ("(openable Fridge_bar_a)", "(openable Apple_bar_a)", "'openable apple_bar_a'"),
        ("(:goal (and", "(:goal (or", "'or'"),
        ("(:goal (and", "(:goal (and (flying ?o)", "'flying'"),
        ("(atLocation agent1 loc_bar_0)", "", "agent"),
        ("loc_bar_2)", "loc_bar_2) (receptacleAtLocation Fridge_bar_a loc_bar_1)", "two places"),
    ],
)
def test_a_problem_outside_the_rules_is_refused(old, new, complaint):
    game = kitchen()
    assert old in game.pddl_problem
    with pytest.raises(ValueError, match=complaint):
        NativeEngine().reset(replace(game, pddl_problem=game.pddl_problem.replace(old, new, 1)))


def test_a_grammar_that_asks_for_unknown_facts_is_refused():
    game = kitchen()
    grammar = game.grammar.replace("holdsany(a:agent)", "hungry(a:agent)")
    with pytest.raises(ValueError, match="hungry"):
        NativeEngine().reset(replace(game, grammar=grammar))


# ── game files ───────────────────────────────────────────────────────────────────────────────


def test_a_written_game_reads_back_the_same(tmp_path):
    game = replace(kitchen(), walkthrough=("look",), name="pick-Apple-None-DiningTable-7/t1")
    game.write(tmp_path / "deep" / "game.tw-pddl")
    assert Game.read(tmp_path / "deep" / "game.tw-pddl") == game
    assert (game.floor_plan, game.goal) == (7, "put some apple on diningtable")
    assert game.task_type == "pick_and_place_simple"


def test_released_files_are_named_after_their_folders():
    for task_type in TASK_TYPES:
        for game in released_games(task_type):
            assert game.name.startswith(task_type + "-")
            assert game.task_type == task_type
            assert game.floor_plan is not None


@pytest.mark.parametrize("content", ["no json", "[]", "{}", '{"grammar": 3}'])
def test_a_file_that_is_no_game_is_refused_with_its_path(tmp_path, content):
    path = tmp_path / "game.tw-pddl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"game\.tw-pddl"):
        Game.read(path)
