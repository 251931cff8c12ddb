"""Makes ALFWorld games from a seed, with the tables of the alfworld package and no download.

    seed ──→ task type ──→ floor plan ──→ goal ──→ receptacles ──→ objects ──→ game.tw-pddl contents
             (uniform)     (of the split)          (of the plan)

A floor plan gives the receptacles, where they stand and which types of objects its room has; the
package's tables say what fits where and what can be cleaned, heated or cooled. Domain, grammar and
goal templates are the package's own, so the texts are those of the published games.

Splits are by floor plan: "heldout" has the four rooms of ALFRED's `valid_unseen` (10, 219, 308,
424), "train" the other 116. Every game is solvable (its walkthrough says how) and not won at the
start: no object of the goal's type begins in a receptacle of the goal's type.

The alfworld package itself is never imported: that would create folders in the user's home.
"""

import importlib.util
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal, TypeVar

from .game import TASK_TYPES, Game

Split = Literal["train", "heldout"]
T = TypeVar("T")

SPLITS: tuple[Split, ...] = ("train", "heldout")
HELD_OUT_PLANS = (10, 219, 308, 424)

# The appliance that each task needs, and the table row of what it works on.
_APPLIANCES = {
    "pick_clean_then_place_in_recep": ("SinkBasin", "Cleanable", "clean"),
    "pick_heat_then_place_in_recep": ("Microwave", "Heatable", "heat"),
    "pick_cool_then_place_in_recep": ("Fridge", "Coolable", "cool"),
}
_ROOMS = {"Kitchen": 0, "LivingRoom": 200, "Bedroom": 300, "Bathroom": 400}
# Receptacles that a plan's layout has no pose for, though its list of objects names them: how many
# there are in the published games.
_WITHOUT_POSE = {"StoveBurner": 4, "CoffeeMachine": 1, "Toaster": 1, "GarbageCan": 1,
                 "TowelHolder": 1, "HandTowelHolder": 2, "ToiletPaperHanger": 1,
                 "LaundryHamper": 1}  # fmt: skip
_LAMP_PLACES = ("Desk", "SideTable", "Dresser")
# Types that the domain names as constants.
_CONSTANT_OTYPES = ("Knife", "ButterKnife")
_CONSTANT_RTYPES = ("SinkBasin", "Microwave", "Fridge")
_MAX_INSTANCES = 3  # of one type, as in the published games


@dataclass(frozen=True)
class _Entity:
    ident: str  # as in the PDDL problem
    kind: str  # "Cabinet", "Apple"


@dataclass(frozen=True)
class _Receptacle(_Entity):
    location: str


@dataclass(frozen=True)
class _Object(_Entity):
    place: _Receptacle


@dataclass(frozen=True)
class _Plan:
    number: int
    receptacles: tuple[_Receptacle, ...]
    object_kinds: tuple[str, ...]


@dataclass(frozen=True)
class _Goal:
    task_type: str
    kind: str
    target: str  # the receptacle's type, or the lamp's


def generate(
    seed: int,
    *,
    split: Split = "train",
    task_types: Sequence[str] = TASK_TYPES,
    max_receptacles: int | None = None,
    max_objects: int | None = None,
) -> Game:
    """The game of that seed; the same on every machine and Python version.

    `max_receptacles` and `max_objects` make games smaller (None: as large as the room is); what
    the goal needs is kept in any case. Raises ValueError for an unknown split or task type.
    """
    check(split, task_types, max_receptacles, max_objects)
    rng = random.Random(f"alfworld {split} {seed}")
    task_type = _pick(rng, task_types)
    possible = [plan for plan in _plans(split) if _goals(plan, task_type)]
    plan = _pick(rng, possible)
    goal = _pick(rng, _goals(plan, task_type))
    receptacles = _furnish(rng, plan, goal, max_receptacles)
    objects = _scatter(rng, plan, goal, receptacles, max_objects)
    trial = f"{split}_{seed}"
    return _game(rng, trial, plan, goal, receptacles=receptacles, objects=objects)


def check(
    split: str,
    task_types: Sequence[str],
    max_receptacles: int | None = None,
    max_objects: int | None = None,
) -> None:
    """Raises ValueError naming the option, its value and what it may be."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
    if isinstance(task_types, str) or not task_types:
        raise ValueError(f"task_types={task_types!r}: give a list of one or more task types")
    for task_type in task_types:
        if task_type not in TASK_TYPES:
            raise ValueError(f"task_types={task_type!r}: choose from {', '.join(TASK_TYPES)}")
    if max_receptacles is not None and max_receptacles < 3:
        raise ValueError(
            f"max_receptacles={max_receptacles}: a goal needs up to 3; give 3 or more, or None"
        )
    if max_objects is not None and max_objects < 4:
        raise ValueError(
            f"max_objects={max_objects}: a goal needs up to 4; give 4 or more, or None"
        )


# ── choosing ─────────────────────────────────────────────────────────────────────────────────


def _pick(rng: random.Random, items: Sequence[T]) -> T:
    """One of the items. Only `random()` is promised to stay the same across Python versions."""
    return items[int(rng.random() * len(items))]


def _shuffled(rng: random.Random, items: Iterable[T]) -> list[T]:
    left = list(items)
    return [left.pop(int(rng.random() * len(left))) for _ in range(len(left))]


@cache
def _goals(plan: _Plan, task_type: str) -> tuple[_Goal, ...]:
    """Every goal of that type that the room allows: something to start in, something to end in."""
    rooms = _tables().GOALS_VALID[task_type]
    if not any(first < plan.number <= first + 30 for room in rooms for first in [_ROOMS[room]]):
        return ()
    kinds = {receptacle.kind for receptacle in plan.receptacles}
    if task_type == "look_at_obj_in_light":
        if "DeskLamp" not in plan.object_kinds or not kinds & set(_LAMP_PLACES):
            return ()
        return tuple(_Goal(task_type, kind, "DeskLamp") for kind in _portable(plan))
    appliance, workable, _ = _APPLIANCES.get(task_type, ("", "", ""))
    if appliance and appliance not in kinds:
        return ()
    actions = _tables().VAL_ACTION_OBJECTS
    return tuple(
        _Goal(task_type, kind, target)
        for kind in _portable(plan)
        if not appliance or kind in actions[workable]
        for target in sorted(kinds)
        if target != appliance and kind in _fits()[target]
        if any(kind in _fits()[other] for other in kinds - {target})
    )


def _furnish(rng: random.Random, plan: _Plan, goal: _Goal, limit: int | None) -> list[_Receptacle]:
    """The receptacles of the game: those the goal needs first, then others up to the limit."""
    order = _shuffled(rng, plan.receptacles)
    needed = [next(r for r in order if goal.kind in _fits()[r.kind] and r.kind != goal.target)]
    if goal.task_type == "look_at_obj_in_light":
        needed.append(next(r for r in order if r.kind in _LAMP_PLACES))
    else:
        needed.append(next(r for r in order if r.kind == goal.target))
    if goal.task_type in _APPLIANCES:
        appliance = _APPLIANCES[goal.task_type][0]
        needed.append(next(r for r in order if r.kind == appliance))
    needed = list(dict.fromkeys(needed))
    room_left = len(order) if limit is None else max(0, limit - len(needed))
    chosen = {*needed, *[r for r in order if r not in needed][:room_left]}
    return [r for r in plan.receptacles if r in chosen]


def _scatter(
    rng: random.Random,
    plan: _Plan,
    goal: _Goal,
    receptacles: Sequence[_Receptacle],
    limit: int | None,
) -> list[_Object]:
    """The objects of the game: those of the goal, then clutter up to the limit."""
    taken: set[str] = set()

    def put(kind: str, places: Sequence[_Receptacle]) -> _Object:
        place = _pick(rng, places)
        ident = _object_ident(rng, kind, taken)
        return _Object(ident, kind, place)

    def places_for(kind: str) -> list[_Receptacle]:
        return [r for r in receptacles if kind in _fits()[r.kind]]

    sources = [r for r in places_for(goal.kind) if r.kind != goal.target]
    fewest = 2 if goal.task_type == "pick_two_obj_and_place" else 1
    copies = _pick(rng, range(fewest, _MAX_INSTANCES + 1))
    objects = [put(goal.kind, sources) for _ in range(copies)]
    if goal.task_type == "look_at_obj_in_light":
        objects.append(put("DeskLamp", [r for r in receptacles if r.kind in _LAMP_PLACES]))
    clutter = [
        kind
        for kind in _portable(plan)
        if kind != goal.kind
        for _ in range(_pick(rng, range(1, _MAX_INSTANCES + 1)))
    ]
    for kind in _shuffled(rng, clutter):
        if limit is not None and len(objects) >= limit:
            break
        if places := places_for(kind):
            objects.append(put(kind, places))
    return objects


# ── writing the problem down ─────────────────────────────────────────────────────────────────


def _game(
    rng: random.Random,
    trial: str,
    plan: _Plan,
    goal: _Goal,
    *,
    receptacles: Sequence[_Receptacle],
    objects: Sequence[_Object],
) -> Game:
    templates = _goal_library().gdict[goal.task_type]
    words = {"obj": goal.kind, "recep": goal.target, "toggle": goal.target}
    task = _pick(rng, templates["templates"]).format(**{k: v.lower() for k, v in words.items()})
    goal_pddl = templates["pddl"].format(**words).replace(" # ", " - ")
    problem = _problem(trial, receptacles, objects, goal_pddl)
    return Game(
        name=f"{goal.task_type}-{goal.kind}-None-{goal.target}-{plan.number}/{trial}",
        pddl_domain=_package_text("data/alfred.pddl"),
        grammar=_package_text("data/alfred.twl2").replace("UNKNOWN GOAL", task),
        pddl_problem=problem,
        walkthrough=tuple(_walkthrough(goal, receptacles, objects)),
    )


def _problem(
    name: str, receptacles: Sequence[_Receptacle], objects: Sequence[_Object], goal_pddl: str
) -> str:
    tables = _tables()
    start = "loc_bar_0_bar_0_bar_0_bar_0"
    locations = sorted({r.location for r in receptacles} | {start})
    otypes = sorted({o.kind for o in objects} | set(_CONSTANT_OTYPES))
    rtypes = sorted({r.kind for r in receptacles} | set(_CONSTANT_RTYPES))
    declared = [
        "agent1 - agent",
        *(f"{kind}Type - otype" for kind in otypes),
        *(f"{kind}Type - rtype" for kind in rtypes),
        *(f"{o.ident} - object" for o in objects),
        *(f"{r.ident} - receptacle" for r in receptacles),
        *(f"{location} - location" for location in locations),
    ]
    abilities: Mapping[str, Iterable[str]] = {
        "pickupable": _movable_kinds(),
        "isReceptacleObject": tables.MOVABLE_RECEPTACLES_SET,
        "cleanable": tables.VAL_ACTION_OBJECTS["Cleanable"],
        "heatable": tables.VAL_ACTION_OBJECTS["Heatable"],
        "coolable": tables.VAL_ACTION_OBJECTS["Coolable"],
        "toggleable": tables.VAL_ACTION_OBJECTS["Toggleable"],
        "sliceable": tables.VAL_ACTION_OBJECTS["Sliceable"],
    }
    facts = [
        f"(atLocation agent1 {start})",
        *(f"(receptacleType {r.ident} {r.kind}Type)" for r in receptacles),
        *(f"(objectType {o.ident} {o.kind}Type)" for o in objects),
        *(f"(canContain {rtype}Type {otype}Type)"
          for rtype in rtypes for otype in otypes if otype in _fits()[rtype]),
        *(f"({ability} {o.ident})"
          for ability, kinds in abilities.items() for o in objects if o.kind in kinds),
        *(f"(openable {r.ident})" for r in receptacles if r.kind in tables.OPENABLE_CLASS_SET),
        *(f"(inReceptacle {o.ident} {o.place.ident})" for o in objects),
        *(f"(receptacleAtLocation {r.ident} {r.location})" for r in receptacles),
        *(f"(objectAtLocation {o.ident} {o.place.location})" for o in objects),
    ]  # fmt: skip
    return (
        f"\n(define (problem plan_{name})\n(:domain alfred)\n(:objects\n"
        + "\n".join(declared)
        + "\n)\n(:init\n"
        + "\n".join(facts)
        + "\n)\n"
        + goal_pddl
    )


def _walkthrough(
    goal: _Goal, receptacles: Sequence[_Receptacle], objects: Sequence[_Object]
) -> list[str]:
    """Commands that win, made with full knowledge of the room."""
    names = _names([*receptacles, *objects])
    openable = _tables().OPENABLE_CLASS_SET
    commands: list[str] = []
    at = ""
    opened: set[str] = set()

    def go(receptacle: _Receptacle, *, inside: bool = True) -> None:
        nonlocal at
        if at != receptacle.location:
            commands.append(f"go to {names[receptacle.ident]}")
            at = receptacle.location
        if inside and receptacle.kind in openable and receptacle.ident not in opened:
            commands.append(f"open {names[receptacle.ident]}")
            opened.add(receptacle.ident)

    def take(obj: _Object) -> None:
        go(obj.place)
        commands.append(f"take {names[obj.ident]} from {names[obj.place.ident]}")

    wanted = [o for o in objects if o.kind == goal.kind]
    if goal.task_type == "look_at_obj_in_light":
        lamp = next(o for o in objects if o.kind == goal.target)
        take(wanted[0])
        go(lamp.place, inside=False)
        return [*commands, f"use {names[lamp.ident]}"]
    target = next(r for r in receptacles if r.kind == goal.target)
    for obj in wanted[: 2 if goal.task_type == "pick_two_obj_and_place" else 1]:
        take(obj)
        if goal.task_type in _APPLIANCES:
            kind, _, verb = _APPLIANCES[goal.task_type]
            appliance = next(r for r in receptacles if r.kind == kind)
            go(appliance, inside=False)
            commands.append(f"{verb} {names[obj.ident]} with {names[appliance.ident]}")
        go(target)
        commands.append(f"move {names[obj.ident]} to {names[target.ident]}")
    return commands


def _names(entities: Iterable[_Entity]) -> dict[str, str]:
    """The names the engine gives: "apple 2". Numbers of a kind run against the order of idents."""
    by_kind: dict[str, list[str]] = {}
    for entity in entities:
        by_kind.setdefault(entity.kind.lower(), []).append(entity.ident)
    return {
        ident: f"{kind} {number}"
        for kind, idents in by_kind.items()
        for number, ident in enumerate(sorted(idents, key=str.lower, reverse=True), start=1)
    }


def _object_ident(rng: random.Random, kind: str, taken: set[str]) -> str:
    """A fresh ident like those of the published games, position and all: it decides the number."""
    while True:
        x, y, z = (int(rng.random() * 800 - 400) for _ in range(3))
        ident = _mangle("|".join([kind, *(f"{v / 100:+06.2f}" for v in (x, y, z))]))
        if ident not in taken:
            taken.add(ident)
            return ident


# ── the tables of the alfworld package ───────────────────────────────────────────────────────


@cache
def entity_counts() -> dict[str, int]:
    """How high names count, by kind in lower case: "drawer" and 13 if a room has drawer 13."""
    objects = _movable_kinds() | set(_tables().VAL_ACTION_OBJECTS["Toggleable"])
    counts = dict.fromkeys(sorted(kind.lower() for kind in objects), 5)  # in published games too
    for kind in sorted(_fits()):
        rooms = [
            sum(receptacle.kind == kind for receptacle in plan.receptacles)
            for split in SPLITS
            for plan in _plans(split)
        ]
        counts[kind.lower()] = max(1, *rooms)
    return counts


def plausible_places(kind: str) -> set[str]:
    """Kinds of receptacles that may hold objects of this kind, all in lower case."""
    return {place.lower() for place, kinds in _fits().items() if kind in {k.lower() for k in kinds}}


@cache
def _plans(split: Split) -> tuple[_Plan, ...]:
    numbers = [first + n for first in _ROOMS.values() for n in range(1, 31)]
    held_out = split == "heldout"
    return tuple(_plan(n) for n in numbers if (n in HELD_OUT_PLANS) == held_out)


def _plan(number: int) -> _Plan:
    stem = f"gen/layouts/FloorPlan{number}"
    poses: dict[str, list[float]] = json.loads(_package_text(f"{stem}-openable.json"))
    kinds: set[str] = set(json.loads(_package_text(f"{stem}-objects.json")))
    receptacles = []
    for ident, pose in sorted(poses.items()):
        fixture, *_, last = ident.split("|")
        if last.endswith("Basin"):  # some layouts call the basin of a bathtub a sink's
            last = f"{fixture}Basin"
            ident = "|".join([*ident.split("|")[:-1], last])  # noqa: PLW2901
        kind = last if last.endswith("Basin") else fixture
        if kind in _fits():
            location = _mangle("|".join(["loc", *_grid(pose)]))
            receptacles.append(_Receptacle(_mangle(ident), kind, location))
    present = {receptacle.kind for receptacle in receptacles}
    free = 1
    for kind, count in _WITHOUT_POSE.items():
        if kind in kinds and kind not in present:
            for _ in range(count):
                ident = _mangle(f"{kind}|+00.00|+00.00|+{free:02d}.00")
                receptacles.append(_Receptacle(ident, kind, _mangle(f"loc|99|{free}|0|30")))
                free += 1
    return _Plan(number, tuple(receptacles), tuple(sorted(kinds)))


def _grid(pose: Sequence[float]) -> tuple[str, str, str, str]:
    """A pose in metres and degrees as the published games write it: quarter metres and turns."""
    x, z, rotation, horizon = pose
    return str(round(x * 4)), str(round(z * 4)), str(round(rotation / 90)), str(round(horizon))


def _mangle(ident: str) -> str:
    for plain, word in (("|", "_bar_"), ("+", "_plus_"), ("-", "_minus_"), (".", "_dot_")):
        ident = ident.replace(plain, word)
    return ident


@cache
def _portable(plan: _Plan) -> tuple[str, ...]:
    """Kinds of objects of the room that can be carried and fit one of its receptacles."""
    places = {receptacle.kind for receptacle in plan.receptacles}
    return tuple(
        kind
        for kind in plan.object_kinds
        if kind in _movable_kinds() and any(kind in _fits()[place] for place in places)
    )


@cache
def _fits() -> dict[str, frozenset[str]]:
    """What each kind of fixed receptacle may hold; sliced things start whole, so without them."""
    table = _tables().VAL_RECEPTACLE_OBJECTS
    portable = _tables().MOVABLE_RECEPTACLES_SET
    return {
        place: frozenset(kind for kind in kinds if not kind.endswith("Sliced"))
        for place, kinds in table.items()
        if place not in portable
    }


@cache
def _movable_kinds() -> frozenset[str]:
    return frozenset(kind for kinds in _fits().values() for kind in kinds)


@cache
def _tables() -> ModuleType:
    return _package_module("gen/constants.py")


@cache
def _goal_library() -> ModuleType:
    return _package_module("gen/goal_library.py")


def _package_module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "flash_alfworld_" + Path(path).stem, _package_folder() / path
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _package_text(path: str) -> str:
    return (_package_folder() / path).read_text(encoding="utf-8")


@cache
def _package_folder() -> Path:
    spec = importlib.util.find_spec("alfworld")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "generated games need the alfworld package: pip install 'flash-rl[alfworld]'"
        )
    return Path(spec.submodule_search_locations[0])
