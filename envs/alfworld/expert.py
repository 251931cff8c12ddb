"""An expert that plays ALFWorld from what it has seen, as a policy must.

It knows which kinds of receptacles may hold what (the package's tables) and nothing of the room
until it has looked: it searches plausible receptacles first, open surfaces before closed doors,
takes the object, works on it where the goal says so, and brings it to its place. The package's own
expert fails every pick-two task, and its planner takes seconds a step and sees through doors.
"""

import random
import re
from dataclasses import dataclass

from .generate import plausible_places

OPENABLE = ("cabinet", "drawer", "fridge", "microwave", "safe")
_LAMP_PLACES = ("desk", "sidetable", "dresser")
_APPLIANCES = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}

_ENTITY = re.compile(r"\ban? (\w+ \d+)")
# The goal templates of the package's library, all of them.
_GOALS = (
    (re.compile(r"put a (?P<state>clean|hot|cool) (?P<kind>\w+) in (?P<target>\w+)"), 1),
    (
        re.compile(r"(?P<state>clean|heat|cool) some (?P<kind>\w+) and put it in (?P<target>\w+)"),
        1,
    ),
    (re.compile(r"put two (?P<kind>\w+) in (?P<target>\w+)"), 2),
    (re.compile(r"find two (?P<kind>\w+) and put them in (?P<target>\w+)"), 2),
    (re.compile(r"look at (?P<kind>\w+) under the (?P<lamp>\w+)"), 1),
    (re.compile(r"examine the (?P<kind>\w+) with the (?P<lamp>\w+)"), 1),
    (re.compile(r"put a (?P<kind>\w+) in (?P<target>\w+)"), 1),
    (re.compile(r"put some (?P<kind>\w+) on (?P<target>\w+)"), 1),
)


@dataclass(frozen=True, slots=True)
class ParsedGoal:
    """What the goal sentence asks for; `verb` is "clean", "heat", "cool" or empty."""

    kind: str
    count: int = 1
    target: str = ""
    lamp: str = ""
    verb: str = ""


def parse_goal(goal: str) -> ParsedGoal:
    """Raises ValueError for a sentence that none of the package's templates makes."""
    for pattern, count in _GOALS:
        if match := pattern.fullmatch(goal.strip().rstrip(".")):
            found = match.groupdict()
            verb = {"hot": "heat"}.get(found.get("state") or "", found.get("state") or "")
            return ParsedGoal(
                found["kind"], count, found.get("target") or "", found.get("lamp") or "", verb
            )
    raise ValueError(f"goal={goal!r}: not one of ALFWorld's goal sentences")


class Expert:
    """Plays one game. Show it every text with `observe`, then ask it to `act`.

    Commands that others gave in between are fine: it learns their effect from the text.
    With `rng` it searches in random order among equally plausible places, else in listed order.
    """

    def __init__(self, goal: str, intro: str, rng: random.Random | None = None) -> None:
        self._goal = parse_goal(goal)
        # The goal stands after the list and names no entity with a number.
        self._receptacles = _ENTITY.findall(intro)
        if rng is not None:
            rng.shuffle(self._receptacles)
        self._contents: dict[str, list[str]] = {}  # of receptacles looked into
        self._closed: set[str] = set()
        self._at = ""
        self._holding = ""
        self._worked_on: set[str] = set()
        self._asked = ""  # the receptacle of the last "go to"

    def observe(self, text: str, command: str = "") -> None:
        """Takes in what the game answered to a command."""
        if command.startswith("go to "):
            self._asked = command.removeprefix("go to ")
            if text.startswith("Nothing happens"):
                # Only a receptacle that stands where we are can't be gone to.
                self._at = self._asked if self._asked in self._receptacles else self._at
        if match := re.match(r"You arrive at (\w+ \d+)", text):
            self._at = match[1]
        if match := re.match(r"You pick up the (\w+ \d+) from the (\w+ \d+)", text):
            self._holding = match[1]
            if match[1] in self._contents.get(match[2], []):
                self._contents[match[2]].remove(match[1])
        if match := re.match(r"You move the (\w+ \d+) to the (\w+ \d+)", text):
            self._holding = ""
            self._contents.setdefault(match[2], []).append(match[1])
        if match := re.match(r"You (?:clean|heat|cool) the (\w+ \d+) using", text):
            self._worked_on.add(match[1])
        if match := re.search(r"You close the (\w+ \d+)|[Tt]he (\w+ \d+) is closed", text):
            self._closed.add(match[1] or match[2])
        if match := re.search(r"[Tt]he (\w+ \d+) is open\. In it, you see (.*)", text):
            self._closed.discard(match[1])
            self._contents[match[1]] = _ENTITY.findall(match[2])
        if match := re.search(r"On the (\w+ \d+), you see (.*)", text):
            self._contents[match[1]] = _ENTITY.findall(match[2])

    def act(self) -> str:
        """The next command; "look" when nothing is left to try."""
        goal = self._goal
        held = self._holding
        if held and _kind(held) != goal.kind:
            return self._put_away(held)
        if not held:
            return self._fetch()
        if goal.lamp:
            return self._light()
        if goal.verb and held not in self._worked_on:
            appliance = self._of_kind(_APPLIANCES[goal.verb])
            if not appliance:
                return "look"
            return self._go(appliance[0]) or f"{goal.verb} {held} with {appliance[0]}"
        return self._place(held)

    def _fetch(self) -> str:
        goal = self._goal
        for receptacle, objects in self._contents.items():
            for name in objects:
                if _kind(name) == goal.kind and not self._is_placed(name, receptacle):
                    return self._reach(receptacle) or f"take {name} from {receptacle}"
        return self._search(plausible_places(goal.kind))

    def _light(self) -> str:
        for receptacle, objects in self._contents.items():
            for name in objects:
                if _kind(name) == self._goal.lamp:
                    return self._go(receptacle) or f"use {name}"
        return self._search(set(_LAMP_PLACES))

    def _place(self, held: str) -> str:
        targets = self._of_kind(self._goal.target)
        # Both objects of a pick-two goal belong in one receptacle.
        holding_one = [
            receptacle
            for receptacle in targets
            if any(_kind(name) == self._goal.kind for name in self._contents.get(receptacle, []))
        ]
        if self._goal.count > 1 and holding_one:
            targets = holding_one
        if not targets:
            return "look"
        return self._reach(targets[0]) or f"move {held} to {targets[0]}"

    def _put_away(self, held: str) -> str:
        """Something else is in hand: put it on the nearest thing that may hold it."""
        places = plausible_places(_kind(held))
        fitting = [r for r in self._receptacles if _kind(r) in places]
        if not fitting:
            return "look"
        here = self._at if self._at in fitting else fitting[0]
        return self._reach(here) or f"move {held} to {here}"

    def _search(self, kinds: set[str]) -> str:
        """Looks into the next receptacle not seen yet: plausible first, surfaces before doors."""
        if self._at in self._receptacles and self._at not in self._contents:
            # Standing before something unseen: a closed door, or a place shared with another.
            if self._at not in self._closed:
                return f"examine {self._at}"
            if _kind(self._at) in kinds:
                return f"open {self._at}"
        unseen = [r for r in self._receptacles if r not in self._contents]
        if not unseen:
            return "look"
        best = min(unseen, key=lambda r: self._unlikely(_kind(r), kinds))
        return self._reach(best) or f"examine {best}"

    def _unlikely(self, place: str, kinds: set[str]) -> tuple[bool, bool, bool]:
        """What is wanted elsewhere is rarely in a place of the goal's kind already."""
        return place not in kinds, place == self._goal.target, place in OPENABLE

    def _reach(self, receptacle: str) -> str:
        """The command that brings us to the open receptacle; empty when we are there."""
        if command := self._go(receptacle):
            return command
        return f"open {receptacle}" if receptacle in self._closed else ""

    def _go(self, receptacle: str) -> str:
        return "" if self._at == receptacle else f"go to {receptacle}"

    def _is_placed(self, name: str, receptacle: str) -> bool:
        goal = self._goal
        return (
            bool(goal.target)
            and _kind(receptacle) == goal.target
            and not (goal.verb and name not in self._worked_on)
        )

    def _of_kind(self, kind: str) -> list[str]:
        return [receptacle for receptacle in self._receptacles if _kind(receptacle) == kind]


def _kind(name: str) -> str:
    return name.split(" ", maxsplit=1)[0]
