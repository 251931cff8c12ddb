"""The fast ALFWorld engine: plays the same files as the real one, with the same answers.

Texts come from the game's own grammar. The rules are written out here, so a game is refused
unless its PDDL domain is one they were checked against; `tests/envs/test_alfworld_engines.py`
plays both engines side by side.

A loaded game is immutable and may be shared. An episode is a handful of sets of facts, so
engines in different threads need no locks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from .engine import State
from .game import Game
from .goal import Goal
from .grammar import Fact, Grammar, Names

# A domain is told by the SHA-256 of its text without comments, in lower case, white space
# collapsed. The released games let an object be cleaned at a sink and at a sink basin, the
# domain that the alfworld package ships at the basin only; there is no other difference.
_RELEASED = "54e29bce2933d7dc48c8665e02d86add1d4600082641fbf91807eeb151cb08fa"
_PACKAGED = "da18d44ab1bcf831f61e90b88a99ad5766d8bbb562b6f87839b4b6ace4f796fe"
_CLEANERS = {_RELEASED: ("sinktype", "sinkbasintype"), _PACKAGED: ("sinkbasintype",)}

_ACTIONS = (
    "look", "inventory", "help", "examinereceptacle", "examineobject", "gotolocation",
    "openobject", "closeobject", "pickupobject", "putobject", "cleanobject", "heatobject",
    "coolobject", "toggleobject", "sliceobject",
)  # fmt: skip

_CHANGING: Mapping[str, tuple[str, ...]] = {
    "atlocation": ("agent", "location"),
    "objectatlocation": ("object", "location"),
    "opened": ("receptacle",),
    "inreceptacle": ("object", "receptacle"),
    "holds": ("agent", "object"),
    "holdsany": ("agent",),
    "isclean": ("object",),
    "ishot": ("object",),
    "iscool": ("object",),
    "ison": ("object",),
    "istoggled": ("object",),
    "issliced": ("object",),
}
_FIXED: Mapping[str, tuple[str, ...]] = {
    "receptacleatlocation": ("receptacle", "location"),
    "openable": ("receptacle",),
    "isreceptacleobject": ("object",),
    "inreceptacleobject": ("object", "object"),
    "isreceptacleobjectfull": ("object",),
    "wasinreceptacle": ("object", "receptacle"),
    "examined": ("location",),
    "receptacletype": ("receptacle", "rtype"),
    "cancontain": ("rtype", "otype"),
    "objecttype": ("object", "otype"),
    "holdsanyreceptacleobject": ("agent",),
    "full": ("receptacle",),
    "cleanable": ("object",),
    "heatable": ("object",),
    "coolable": ("object",),
    "pickupable": ("object",),
    "moveable": ("object",),
    "toggleable": ("object",),
    "sliceable": ("object",),
}
_SIGNATURES = {**_CHANGING, **_FIXED}

# Facts and functions that bear on neither commands nor texts.
_UNUSED = ("checked", "distance", "total-cost")

# What an action makes true (+) and false (-), over its parameters.
_EFFECTS: Mapping[str, tuple[str, ...]] = {
    "gotolocation": ("-atlocation a lstart", "+atlocation a lend"),
    "openobject": ("+opened r",),
    "closeobject": ("-opened r",),
    "pickupobject": ("-inreceptacle o r", "-objectatlocation o l", "+holds a o", "+holdsany a"),
    "putobject": ("-holds a o", "-holdsany a", "+inreceptacle o r", "+objectatlocation o l"),
    "cleanobject": ("+isclean o",),
    "heatobject": ("-iscool o", "+ishot o"),
    "coolobject": ("-ishot o", "+iscool o"),
    "toggleobject": ("+istoggled o",),  # and so it stays: a lamp never turns off again
    "sliceobject": ("+issliced co",),
}


class NativeEngine:
    """Plays ALFWorld games with the standard library alone; see `Engine` for the calls.

    A step costs a tenth of a millisecond, admissible commands included. One engine plays one
    game and belongs to one thread at a time; any number of engines may run in parallel.
    """

    def __init__(self) -> None:
        self._episode: _Episode | None = None

    def reset(self, game: Game) -> State:
        """Starts the game. Raises ValueError naming the game if its file is not understood."""
        self._episode = _Episode(_load(game))
        return self._episode.intro()

    def step(self, command: str) -> State:
        """Plays one command."""
        assert self._episode is not None, "step before reset"
        return self._episode.step(command)

    def close(self) -> None:
        """Drops the episode."""
        self._episode = None


@lru_cache(maxsize=64)  # a group's episodes play one game: read it once, hold its world once
def _load(game: Game) -> _World:
    try:
        return _World(game)
    except ValueError as error:
        raise ValueError(
            f"the native engine cannot play game {game.name!r}: {error}. TextWorldEngine may."
        ) from error


class _World:
    """All of a game that no command changes: names, places, properties, goal and texts."""

    def __init__(self, game: Game) -> None:
        cleaners = _CLEANERS.get(_digest(game.pddl_domain))
        if cleaners is None:
            raise ValueError("its PDDL domain is not one whose rules are known here")
        self.grammar = Grammar(game.grammar, actions=_ACTIONS, signatures=_SIGNATURES)
        types, named_facts, goal = _read_problem(game.pddl_problem)
        ids = sorted(types)
        entity = {id_: number for number, id_ in enumerate(ids)}
        self.facts: dict[str, set[Fact]] = {predicate: set() for predicate in _SIGNATURES}
        mentioned: set[str] = set()
        for predicate, *arguments in named_facts:
            signature = _SIGNATURES.get(predicate)
            if signature is None or signature != tuple([types.get(a) for a in arguments]):
                raise ValueError(f"its problem states {' '.join([predicate, *arguments])!r}")
            self.facts[predicate].add(tuple([entity[a] for a in arguments]))
            mentioned.update(arguments)
        self.names = Names(name=_names(ids, mentioned), id=ids)
        self.goal = Goal(goal, types, entity, self.facts, changing=_CHANGING)

        if len(self.facts["atlocation"]) != 1:
            raise ValueError("there is not exactly one agent at one place")
        ((self.agent, self.start),) = self.facts["atlocation"]
        self.place: dict[int, int] = {}
        self.receptacles_at: dict[int, list[int]] = {}
        for receptacle, location in sorted(self.facts["receptacleatlocation"]):
            if receptacle in self.place:
                raise ValueError(f"{ids[receptacle]} is at two places")
            self.place[receptacle] = location
            self.receptacles_at.setdefault(location, []).append(receptacle)

        kinds = self.facts["receptacletype"] | self.facts["objecttype"]

        def of_types(*wanted: str) -> frozenset[int]:
            return frozenset(one for one, kind in kinds if ids[kind] in wanted)

        self.kinds: dict[int, list[int]] = {}
        for one, kind in kinds:
            self.kinds.setdefault(one, []).append(kind)
        self.knives = of_types("knifetype", "butterknifetype")
        self.tools = (  # action, where it is done, what it can be done to
            ("cleanobject", of_types(*cleaners), "cleanable"),
            ("heatobject", of_types("microwavetype"), "heatable"),
            ("coolobject", of_types("fridgetype"), "coolable"),
        )
        self.goto_commands = {
            receptacle: self.command(
                "gotolocation", {"a": self.agent, "r": receptacle, "lend": location}
            )
            for receptacle, location in self.place.items()
        }

    def command(self, action: str, binding: Mapping[str, int]) -> str:
        template = self.grammar.actions[action].command
        return self.grammar.render(template, binding, self.facts, self.names)


@dataclass(frozen=True, slots=True)
class _Move:
    """What a command would do, with the action's parameters bound as the grammar knows them."""

    action: str
    binding: Mapping[str, int]


class _Episode:
    """A game in progress."""

    def __init__(self, world: _World) -> None:
        self._world = world
        self._facts = dict(world.facts)
        for predicate in _CHANGING:
            self._facts[predicate] = set(world.facts[predicate])
            self._facts["not_" + predicate] = set()
        self._location = world.start
        self._look_around()

    def intro(self) -> State:
        return self._state(
            self._world.grammar.render_rule("intro", {}, self._facts, self._world.names)
        )

    def step(self, command: str) -> State:
        move = self._moves.get(command.strip())
        if move is None:
            return self._state("Nothing happens.")
        changed = self._apply(move)
        feedback = self._world.grammar.actions[move.action].feedback
        text = self._world.grammar.render(feedback, move.binding, self._facts, self._world.names)
        if changed:
            self._look_around()
        return self._state(text)

    def _state(self, text: str) -> State:
        return State(text, self._commands, float(self._won), self._won)

    def _look_around(self) -> None:
        """Works out what the facts now allow, and whether the goal is fulfilled."""
        world, facts, agent, location = self._world, self._facts, self._world.agent, self._location
        self._moves: dict[str, _Move] = {}
        self._allow("look", a=agent, l=location)
        self._allow("inventory", a=agent)
        self._allow("help", a=agent)
        for receptacle, command in world.goto_commands.items():
            # Going where one stands changes nothing, and grounding drops moves without effect.
            if (place := world.place[receptacle]) != location:
                self._moves[command] = _Move(
                    "gotolocation",
                    {"a": agent, "lstart": location, "lend": place, "r": receptacle},
                )
        held = [o for _, o in facts["holds"]]
        for receptacle in world.receptacles_at.get(location, ()):
            self._look_at(receptacle, held)
        for o in held:
            # The domain means to allow this for all that is in reach, but a comma in its
            # quantifier ("?l - location, ?r - receptacle") makes a type that nothing has.
            self._allow("examineobject", a=agent, o=o)
            if o in world.knives:
                for (sliced,) in facts["sliceable"]:
                    if (sliced, location) in facts["objectatlocation"]:
                        self._allow("sliceobject", a=agent, l=location, co=sliced, ko=o)
        self._commands = tuple(sorted(self._moves))
        self._won = world.goal.holds(facts)

    def _look_at(self, r: int, held: Sequence[int]) -> None:
        world, facts, agent, location = self._world, self._facts, self._world.agent, self._location
        self._allow("examinereceptacle", a=agent, r=r)
        opened = (r,) in facts["opened"]
        accessible = opened
        if (r,) in facts["openable"]:
            self._allow("closeobject" if opened else "openobject", a=agent, l=location, r=r)
        else:
            accessible = True
        hands_free = not facts["holdsany"]
        for o, where in facts["inreceptacle"]:
            if where != r:
                continue
            if hands_free and accessible and (o,) in facts["pickupable"]:
                self._allow("pickupobject", a=agent, l=location, o=o, r=r)
            if (o,) in facts["toggleable"]:
                self._allow("toggleobject", a=agent, l=location, o=o, r=r)
        for o in held:
            if accessible:
                for rt, ot in product(world.kinds.get(r, ()), world.kinds.get(o, ())):
                    if (rt, ot) in facts["cancontain"]:
                        self._allow("putobject", a=agent, l=location, o=o, r=r, ot=ot, rt=rt)
            for action, places, property_ in world.tools:
                # No door need be open: a closed microwave heats.
                if r in places and (o,) in facts[property_]:
                    self._allow(action, a=agent, l=location, r=r, o=o)

    def _allow(self, action: str, **binding: int) -> None:
        self._moves[self._world.command(action, binding)] = _Move(action, binding)

    def _apply(self, move: _Move) -> bool:
        """Makes the move's effects facts; False if it has none."""
        effects = _EFFECTS.get(move.action, ())
        if move.action == "gotolocation":
            self._location = move.binding["lend"]
        elif move.action == "toggleobject":
            is_on = (move.binding["o"],) in self._facts["ison"]
            effects = ("-ison o" if is_on else "+ison o", *effects)
        for effect in effects:
            predicate, *variables = effect[1:].split()
            fact = tuple([move.binding[v] for v in variables])
            # TextWorld keeps what became false as a fact of its own, and grammars ask for it;
            # what was never true is no such fact.
            now, before = (predicate, "not_" + predicate)
            if effect[0] == "-":
                now, before = before, now
            self._facts[before].discard(fact)
            self._facts[now].add(fact)
        return bool(effects)


def _digest(domain: str) -> str:
    text = " ".join(re.sub(r";[^\n]*", "", domain).lower().split())
    return hashlib.sha256(text.encode()).hexdigest()


def _read_problem(problem: str) -> tuple[dict[str, str], list[list[str]], str]:
    """The type of each object, the initial facts, and the goal's text; all in lower case."""
    text = re.sub(r";[^\n]*", "", problem).lower()
    text = re.sub(r"\(:metric[^()]*(\([^()]*\))?\s*\)", "", text)  # for planners
    sections = re.fullmatch(
        r".*?\(:objects(.*?)\)\s*\(:init(.*)\)\s*\(:goal(.*)\)\s*\)\s*", text, re.DOTALL
    )
    if sections is None:
        raise ValueError("its PDDL problem is not made of (:objects) (:init) (:goal)")
    declared, init, goal = sections.groups()
    objects: dict[str, str] = {}
    untyped: list[str] = []
    words = iter(declared.split())
    for word in words:
        if word == "-":
            objects.update(dict.fromkeys(untyped, next(words, "")))
            untyped.clear()
        else:
            untyped.append(word)
    if untyped:
        raise ValueError(f"objects without a type: {untyped[:3]}")
    facts = [match.split() for match in re.findall(r"\(\s*([a-z][^()]*)\)", init)]
    return objects, [fact for fact in facts if fact[0] not in _UNUSED], goal


def _names(ids: Sequence[str], mentioned: Iterable[str]) -> list[str]:
    """`alarmclock_bar_...` becomes "alarmclock 2": numbered from the last identifier upwards.

    Only entities that some initial fact mentions are counted, as in alfworld's demangler.
    """
    mentioned = set(mentioned)
    kinds: dict[str, list[str]] = {}
    for id_ in ids:
        if id_ in mentioned:
            kind, mark, _ = id_.partition("_bar_")
            if mark:
                kinds.setdefault(kind + ("basin" if "basin" in id_ else ""), []).append(id_)
    names = {id_: f"{id_} " for id_ in ids}
    for kind, members in kinds.items():
        for number, id_ in enumerate(reversed(members), start=1):
            names[id_] = f"{kind} {number}"
    return [names[id_] for id_ in ids]
