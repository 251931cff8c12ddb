"""From the keys of another system's configuration to one of ours that loads, with what became of
each key."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from flash import config as configuration
from flash.convert.counterparts import no_environment
from flash.convert.gerl import GERL
from flash.convert.roll import ROLL
from flash.convert.rules import (
    Answer,
    Becomes,
    Given,
    Missing,
    NoMeaning,
    Placeholder,
    Rule,
    System,
)
from flash.convert.source import Source
from flash.convert.trinity import TRINITY
from flash.convert.verl import VERL

SYSTEMS = {system.name: system for system in (ROLL, TRINITY, VERL, GERL)}
_FIELDS = {name: place for place, (name, _) in enumerate(configuration.fields())}
_NAME = re.compile(r"[a-z_]\w*(?:\.\w+)*")
_SECRET = re.compile(r"(api_?key|token|password|secret)$", re.IGNORECASE)

Outcome = Literal["mapped", "no meaning here", "missing here", "unknown"]
OUTCOMES: tuple[Outcome, ...] = ("mapped", "no meaning here", "missing here", "unknown")


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a key; `fields` are ours that it gave, `note` a unit or a reason."""

    key: str
    value: Any
    outcome: Outcome
    note: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Added:
    """One of our fields that no key gave, and why it is set."""

    field: str
    value: Any
    why: str


@dataclass(frozen=True, slots=True)
class Converted:
    """A configuration that loads, and what it was made of.

    Args:
        settings: by dotted name, in the order of `flash train --help`.
        decide: what somebody must decide before a run: what stands for it starts none.
    """

    system: System
    settings: Mapping[str, Any]
    rows: tuple[Row, ...]
    added: tuple[Added, ...]
    decide: tuple[str, ...]

    def counts(self) -> dict[Outcome, int]:
        return {kind: sum(row.outcome == kind for row in self.rows) for kind in OUTCOMES}

    def nested(self) -> dict[str, Any]:
        """The settings as a file has them."""
        return _nested(self.settings)


def recognised(source: Source) -> System:
    """Whose configuration it is. ValueError for none that is known, and for a mixture."""
    found = {name: keys[0] for name in SYSTEMS if (keys := source.fitting(*SYSTEMS[name].signs))}
    if "gerl" in found:  # it has verl's keys, too
        found.pop("verl", None)
    names = ", ".join(SYSTEMS)
    if not found:
        ours = [key for key in source if key in _FIELDS]
        hint = f"; {ours[0]} is a field of flash's own, which flash train takes" if ours else ""
        raise ValueError(
            f"no key is of a system that is known ({names}){hint}: say --from if it is of one of "
            f"these"
        )
    if len(found) > 1:
        mixed = ", and ".join(f"{key} of {SYSTEMS[name].title}" for name, key in found.items())
        raise ValueError(f"keys of several systems: {mixed}: give one's, or say --from")
    return SYSTEMS[next(iter(found))]


def convert(source: Source, system: System, *, name: str) -> Converted:
    """Converts it; `name` is the run's unless a key gives another.

    ValueError if not even what is needed can be loaded.
    """
    source = source.over(system.values)
    made = _Making(system)
    order = list(system.rules)
    matched = {key: _pattern(key, order) for key in source}
    rows = {
        key: made.row(Given(key, source[key], source), pattern)
        for key, pattern in sorted(
            matched.items(), key=lambda item: order.index(item[1]) if item[1] else len(order)
        )
    }
    made.add("name", name, "the file's")
    for default in system.defaults:
        if (value := default.how(source)) is not None:
            made.add(default.field, value, default.why)
    if "env.name" not in made.settings:
        made.place(no_environment("no key names an environment, or data"))
    longest = made.settings.get("agent.max_sequence_tokens", 0)
    if longest > configuration.Config.model_fields["engine"].default.cache_tokens:
        made.add("engine.cache_tokens", longest, "a worker must hold a whole episode")
    return made.loaded(rows[key] for key in source)


def _pattern(key: str, patterns: Iterable[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(key, pattern)), None)


class _Making:
    """Settings that are being made, each by the first who gives it."""

    def __init__(self, system: System) -> None:
        self._system = system
        self.settings: dict[str, Any] = {}
        self._given_by: dict[str, str] = {}
        self._added: list[Added] = []
        self._decide: list[str] = []

    def row(self, given: Given, pattern: str | None) -> Row:
        """What becomes of a key, whose rule has that pattern; None: nobody knows it."""
        shown = "(not shown)" if _SECRET.search(given.key) else given.value
        if pattern is None:
            why = f"no key of {self._system.title} that is known: look whether it is spelt right"
            return Row(given.key, shown, "unknown", why)
        rule = self._system.rules[pattern]
        answer = _answer(rule, given)
        if isinstance(answer, Mapping):
            assert isinstance(rule, Becomes), "nothing else gives fields"
            if taken := self._take(answer, given.key):
                return Row(given.key, shown, "mapped", rule.unit, taken)
            before = ", ".join(f"{name} is {self._given_by[name]}'s" for name in answer)
            answer = NoMeaning(f"{before}, which counts")
        elif isinstance(answer, Placeholder):
            self.place(answer)
        outcome: Outcome = "no meaning here" if isinstance(answer, NoMeaning) else "missing here"
        return Row(given.key, shown, outcome, answer.why)

    def place(self, placeholder: Placeholder) -> None:
        """Puts what stands for something that must be decided, where nothing is."""
        self._take(placeholder.fields, "a placeholder")
        if placeholder.why not in self._decide:
            self._decide.append(placeholder.why)

    def add(self, name: str, value: Any, why: str) -> None:
        if name not in self.settings:
            self.settings[name] = value
            self._added.append(Added(name, value, why))

    def _take(self, answer: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Those of the fields that are given so, now or before; what is of several keys grows."""
        taken: dict[str, Any] = {}
        for name, value in answer.items():
            before = self.settings.get(name)
            whole = value
            if isinstance(before, list) and isinstance(value, list):
                whole = [*before, *value]
            elif isinstance(before, dict) and isinstance(value, dict):
                if all(before.get(inner, one) != one for inner, one in value.items()):
                    continue
                whole = {**value, **before}
            elif before not in (None, value):
                continue
            self.settings[name] = whole
            self._given_by.setdefault(name, key)
            taken[name] = value
        return taken

    def loaded(self, rows: Iterable[Row]) -> Converted:
        """What loads of it; what is refused is told, and left out."""
        refused: dict[str, str] = {}
        while True:
            try:
                configuration.parse(_nested(self.settings))
                break
            except ValueError as error:
                line = str(error).splitlines()[0]
                if not (names := self._named_in(line)):
                    raise
                for name in names:
                    del self.settings[name]
                    refused[name] = line
        lost = [one for one in self._added if one.field in refused]
        self._decide += [f"{one.field}: {one.why}; refused: {refused[one.field]}" for one in lost]
        return Converted(
            system=self._system,
            settings={name: self.settings[name] for name in sorted(self.settings, key=_order)},
            rows=tuple(_without(row, refused) for row in rows),
            added=tuple(one for one in self._added if one not in lost),
            decide=tuple(self._decide),
        )

    def _named_in(self, line: str) -> list[str]:
        """The first field that a message names, of those that can be left out; or all of the first
        section."""
        for name in _NAME.findall(line):
            known = [one for one in self.settings if _holds(one, name) or _holds(name, one)]
            if known:
                return known
        return []


def _answer(rule: Rule, given: Given) -> Answer:
    if given.value is None or given.value in ({}, [], ""):
        return NoMeaning("nothing is set")
    if isinstance(rule, NoMeaning | Missing):
        return rule
    try:
        return rule.answer(given)
    except (TypeError, ValueError, OverflowError):  # a value of a kind that the key does not have
        return Missing(f"{given.value!r} is no value that is understood: set it by hand")


def _holds(section: str, name: str) -> bool:
    return f"{name}.".startswith(f"{section}.")


def _order(name: str) -> int:
    return _FIELDS[name]


def _without(row: Row, refused: Mapping[str, str]) -> Row:
    """The row without what the loader refused, which is told; if nothing is left, it is missing."""
    gone = [name for name in row.fields if name in refused]
    if not gone:
        return row
    left = {name: value for name, value in row.fields.items() if name not in refused}
    why = f"refused: {refused[gone[0]]}"
    if left:
        return replace(row, fields=left, note=f"{row.note}; {', '.join(gone)} {why}")
    return Row(row.key, row.value, "missing here", why)


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, last = name.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return nested
