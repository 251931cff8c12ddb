"""One ALFWorld game: the record behind a `game.tw-pddl` file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

TASK_TYPES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)

_GOAL_TEXT = re.compile(r'"Your task is to: (.*?)\.?"\s*\}')


@dataclass(frozen=True)
class Game:
    """What a `game.tw-pddl` file holds, as text; the engines read everything else from it.

    `name` tells games apart for people and logs: `<task>-<object>-None-<target>-<floor plan>`,
    optionally followed by `/<trial>`, as in the released data set. `walkthrough` is one winning
    list of commands, empty if none is known. Equality is by content, so a game is its own key.
    """

    pddl_domain: str = field(repr=False)
    grammar: str = field(repr=False)
    pddl_problem: str = field(repr=False)
    walkthrough: tuple[str, ...] = field(default=(), repr=False)
    solvable: bool = True
    name: str = ""

    @classmethod
    def read(cls, path: str | Path) -> Game:
        """The game in a file; without a name inside, it is named after its two folders.

        Raises ValueError naming the file if a key is missing or of the wrong kind.
        """
        path = Path(path)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path} is not a tw-pddl game: a JSON object was expected")
        name = record.get("name") or "/".join(path.absolute().parent.parts[-2:])
        walkthrough = record.get("walkthrough") or []
        if not isinstance(walkthrough, list) or not all(isinstance(c, str) for c in walkthrough):
            raise ValueError(f"{path}: 'walkthrough' is not a list of commands")
        return cls(
            pddl_domain=_text(record, "pddl_domain", path),
            grammar=_text(record, "grammar", path),
            pddl_problem=_text(record, "pddl_problem", path),
            walkthrough=tuple(walkthrough),
            solvable=bool(record.get("solvable", True)),
            name=str(name),
        )

    def write(self, path: str | Path) -> None:
        """Writes the game as a file that every ALFWorld engine reads; folders are created."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.record()), encoding="utf-8")

    def record(self) -> dict[str, object]:
        """The file's content as the object that JSON holds."""
        return {
            "pddl_domain": self.pddl_domain,
            "grammar": self.grammar,
            "pddl_problem": self.pddl_problem,
            "solvable": self.solvable,
            "walkthrough": list(self.walkthrough),
            "name": self.name,
        }

    @cached_property
    def task_type(self) -> str:
        """One of TASK_TYPES, read from the goal, so a renamed file keeps its type.

        Raises ValueError if the goal is of another kind (sliced and movable-receptacle tasks).
        """
        goal = self.goal_pddl.lower()
        if "issliced" in goal or "inreceptacleobject" in goal:
            raise ValueError(f"{self.name}: tasks with slices or movable receptacles are unknown")
        for predicate, task_type in (
            ("istoggled", "look_at_obj_in_light"),
            ("isclean", "pick_clean_then_place_in_recep"),
            ("ishot", "pick_heat_then_place_in_recep"),
            ("iscool", "pick_cool_then_place_in_recep"),
            ("=", "pick_two_obj_and_place"),
            ("inreceptacle", "pick_and_place_simple"),
        ):
            if predicate in goal:
                return task_type
        raise ValueError(f"{self.name}: no known task has the goal {self.goal_pddl!r}")

    @cached_property
    def goal(self) -> str:
        """The task in words, without "Your task is to:" and the final full stop."""
        match = _GOAL_TEXT.search(self.grammar)
        if match is None:
            raise ValueError(f"{self.name}: the grammar has no 'Your task is to: ...' rule")
        return match.group(1)

    @cached_property
    def goal_pddl(self) -> str:
        """The `(:goal ...)` section, to the end of the problem."""
        start = self.pddl_problem.lower().find("(:goal")
        if start < 0:
            raise ValueError(f"{self.name}: the problem has no (:goal ...)")
        return self.pddl_problem[start:]

    @cached_property
    def floor_plan(self) -> int | None:
        """The AI2-THOR scene from the game's name; None if the name tells none."""
        digits = self.name.split("/", 1)[0].rpartition("-")[2]
        return int(digits) if digits.isdecimal() else None


def _text(record: Mapping[str, object], key: str, path: Path) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise ValueError(f"{path} is not a tw-pddl game: {key!r} is missing or not text")
    return value
