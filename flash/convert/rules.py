"""What becomes of a key of another system: the rules that its table is made of.

A table says for each pattern of keys what there is of it here, as data; what depends on other keys
of the file is a function beside it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flash.convert.source import Source


@dataclass(frozen=True, slots=True)
class NoMeaning:
    """There is nothing here that it could change."""

    why: str


@dataclass(frozen=True, slots=True)
class Missing:
    """It would change something that can't be changed here, or is refused; with what is nearest."""

    why: str


@dataclass(frozen=True, slots=True)
class Placeholder:
    """Likewise; what stands in its place loads, and somebody must decide before a run."""

    fields: Mapping[str, Any]
    why: str


Answer = Mapping[str, Any] | NoMeaning | Missing | Placeholder


@dataclass(frozen=True, slots=True)
class Given:
    """A key of the file, with its value, among the others."""

    key: str
    value: Any
    source: Source


@dataclass(frozen=True, slots=True)
class Depends:
    """Of no meaning with the `neutral` values, else missing."""

    neutral: tuple[Any, ...]
    why: str
    otherwise: str

    def answer(self, given: Given) -> Answer:
        return NoMeaning(self.why) if given.value in self.neutral else Missing(self.otherwise)


@dataclass(frozen=True, slots=True)
class Becomes:
    """It is one of our fields, or several. `unit`: what is counted, there and here."""

    fields: tuple[str, ...]
    unit: str
    how: Callable[[Given], Answer]

    def answer(self, given: Given) -> Answer:
        answer = self.how(given)
        if isinstance(answer, Mapping):
            assert answer.keys() <= set(self.fields), (given.key, answer)
        return answer


Rule = NoMeaning | Missing | Depends | Becomes


@dataclass(frozen=True, slots=True)
class Default:
    """What a system takes where a file says nothing, and is not our default."""

    field: str
    how: Callable[[Source], Any]  # None: nothing
    why: str


@dataclass(frozen=True, slots=True)
class System:
    """Another system, as its configuration is written.

    Args:
        title: its name, as it is written.
        signs: patterns of keys that only it has, of those that can be converted.
        rules: by pattern, where `*` is anything. The first that fits a key is its rule; the first
            in the table that gives a field has it, wherever it stands in a file.
        defaults: what is set of ours where no key gives it.
        values: keys as they are where a file does not give them, for rules that look at them.
    """

    name: str
    title: str
    signs: tuple[str, ...]
    rules: Mapping[str, Rule]
    defaults: tuple[Default, ...]
    values: Mapping[str, Any] = field(default_factory=dict)


def is_field(field: str, unit: str, how: Callable[[Any], Any] = lambda value: value) -> Becomes:
    """One of our fields, with the value as it is, or as `how` changes it."""
    return Becomes((field,), unit, lambda given: {field: how(given.value)})


def by_name(field: str, unit: str, names: Mapping[Any, Any], otherwise: str) -> Becomes:
    """One of our fields, whose values have other names; `otherwise` tells of what has none."""

    def how(given: Given) -> Answer:
        if given.value in names:
            return {field: names[given.value]}
        return Missing(f"{given.value}: {otherwise}")

    return Becomes((field,), unit, how)
