"""YAML of files and of command lines, in which no key may come twice."""

import math
from typing import Any

import yaml

_MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML forbids a key that comes twice; the parser would take the last one without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused later: no field has such a name
            if key.value in first:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is given twice, first in line {first[key.value]}",
                    problem_mark=key.start_mark,
                )
            first[key.value] = key.start_mark.line + 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:  # a date of month 13, a number of a million digits
            why = f"{node.value[:20]!r} is no value: {error}"
            raise yaml.MarkedYAMLError(problem=why, problem_mark=node.start_mark) from error


def plain_values(text: str, where: str) -> Any:
    """What the text says. ValueError in one line, which tells `where` it is written."""
    place = ""
    try:
        values = yaml.load(text, _Loader)
        if _size(values, {}) <= _MOST_VALUES:
            return values
        why = f"aliases make more than {_MOST_VALUES:,} values of it"
    except yaml.MarkedYAMLError as error:
        if (mark := error.problem_mark) is not None:
            place = f"line {mark.line + 1}, column {mark.column + 1}: "
        why = error.problem or str(error)
    except RecursionError:
        why = "brackets in brackets, too deep to read"
    except yaml.reader.ReaderError as error:
        place = f"line {text.count(chr(10), 0, error.position) + 1}: "
        why = f"no text has the character {error.character:#04x}"
    raise ValueError(f"{where} is not YAML: {place}{' '.join(why.split())}: correct it there")


def _size(value: Any, known: dict[int, float]) -> float:
    """How many values it would be, written out; infinite if it holds itself.

    `known`: of those that aliases name again, by identity.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in known:
        known[id(value)] = math.inf  # until it is known: of what is inside itself
        inner = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(one, known) for one in inner)
    return known[id(value)]
