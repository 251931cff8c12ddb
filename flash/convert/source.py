"""Reads the configuration of another system: YAML, or a script's key=value words.

Both become leaves: values by dotted key, in the order of the file, with references resolved.
"""

import ast
import math
import operator
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

from flash.config.source import read_mapping, text_of
from flash.config.yaml_text import plain_values

_OVERRIDE = re.compile(r"\+{0,2}([A-Za-z_]\w*(?:\.\w+)+)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_IN_SHELL = re.compile(
    r"\$\(\(([^()]*(?:\([^()]*\)[^()]*)*)\)\)|\$\{(\w+)(?::?[-=]([^}]*))?\}|\$(\w+)"
)
_SUM = re.compile(r"\$\(\(.*?\)\)")
_REFERENCE = re.compile(r"\$\{([^${}]+)\}")
_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # as 1e-6, which YAML takes for a text
_MOST_REFERENCES = 20  # one after the other: more refer to themselves


class Source(Mapping[str, Any]):
    """The leaves of a configuration, by dotted key; looked up, also those of its system that it
    leaves as they are."""

    def __init__(
        self, leaves: Mapping[str, Any], of_system: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self._leaves, self._of_system = dict(leaves), of_system

    def over(self, of_system: Mapping[str, Any]) -> Self:
        """The same, of a system that has these values unless they are given."""
        return type(self)(self._leaves, of_system)

    def __getitem__(self, key: str) -> Any:
        return self._leaves[key] if key in self._leaves else self._of_system[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)

    def first(self, *keys: str, default: Any = None) -> Any:
        """The value of the first of these keys that has one."""
        return next((self[key] for key in keys if self.get(key) is not None), default)

    def text(self, *keys: str, default: str = "") -> str:
        """Likewise, of keys that name something; what is no text counts as the default."""
        value = self.first(*keys)
        return value if isinstance(value, str) else default

    def number(self, *keys: str, default: float = 0) -> float:
        """Likewise, of keys that measure; what is no number counts as the default."""
        value = self.first(*keys)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if is_number and math.isfinite(value) else default

    def count(self, *keys: str, default: int) -> int:
        """Likewise, of keys that count; what is no number of at least 1 counts as the default."""
        value = self.number(*keys)
        return int(value) if value >= 1 else default

    def fitting(self, *patterns: str) -> list[str]:
        """The keys that one of the patterns fits."""
        return [key for key in self if any(fnmatchcase(key, pattern) for pattern in patterns)]


def read(path: Path) -> Source:
    """The configuration in a file. ValueError if it holds none, or can't be read."""
    if path.suffix in (".yaml", ".yml"):
        return Source(_resolved(dict(_leaves(read_mapping(path, "key: value")))))
    if not (leaves := _overrides(text_of(path), path)):
        raise ValueError(
            f"{path} holds no words section.key=value: give a YAML file (.yaml), or a script that "
            f"has such words"
        )
    return Source(_resolved(leaves))


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """What is in nested values; a list of values is one leaf, one of sections is not."""
    of_sections = isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
    items = dict(enumerate(value)) if of_sections else value
    if isinstance(items, Mapping) and items:
        for name, inner in items.items():
            yield from _leaves(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def _overrides(text: str, path: Path) -> dict[str, Any]:
    """The overrides among the words of a shell script, which may use its variables, and those of
    the environment."""
    variables: dict[str, str] = dict(os.environ)
    found: dict[str, Any] = {}
    text = _SUM.sub(lambda match: match[0].replace(" ", ""), text.replace("\\\n", " "))
    for line in text.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation over several lines, a here-document: no overrides
            continue
        for word in words:
            if override := _OVERRIDE.fullmatch(word):
                key, value = override[1], _expanded(override[2], variables)
                found[key] = plain_values(value, f"{path}: {key}={value!r}")
            elif variable := _VARIABLE.fullmatch(word):
                variables[variable[1]] = _expanded(variable[2], variables)
    return found


def _expanded(text: str, variables: Mapping[str, str]) -> str:
    """A shell's variables, with their defaults, and its sums; what is not known stays."""

    def put(match: re.Match[str]) -> str:
        sum_of, braced, default, bare = match.groups()
        if sum_of is not None:
            return _sum(_NAME.sub(lambda m: variables.get(m[1], m[0]), sum_of), match[0])
        return variables.get(braced or bare, default if default is not None else match[0])

    for _ in range(2):  # a default, and a sum, may name another
        text = _IN_SHELL.sub(put, text)
    return text


_NAME = re.compile(r"\$?\{?([A-Za-z_]\w*)\}?")
_SIGNS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.floordiv
}  # fmt: skip


def _sum(text: str, otherwise: str) -> str:
    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp) and type(node.op) in _SIGNS:
            result: int = _SIGNS[type(node.op)](value(node.left), value(node.right))
            return result
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        raise ValueError

    try:
        return str(value(ast.parse(text.strip(), mode="eval").body))
    except (SyntaxError, ValueError, ZeroDivisionError):
        return otherwise


def _resolved(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """With what OmegaConf would put for ${key}, ${oc.env:NAME,default}, ${oc.select:key,default};
    what it would compute otherwise stays as it is written."""
    return {key: _value(value, leaves) for key, value in leaves.items()}


def _value(value: Any, leaves: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_value(item, leaves) for item in value]
    for _ in range(_MOST_REFERENCES):
        if not isinstance(value, str) or not (match := _REFERENCE.search(value)):
            break
        put = _referred(match[1], leaves)
        if put is None:
            break
        whole = match[0] == value
        value = put if whole else f"{value[: match.start()]}{put}{value[match.end() :]}"
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def _referred(name: str, leaves: Mapping[str, Any]) -> Any:
    """None for what is not known."""
    kind, _, of = name.partition(":")
    if kind in ("oc.env", "oc.select"):
        where, _, default = of.partition(",")
        known = os.environ if kind == "oc.env" else leaves
        return known.get(where.strip(), default.strip() or None)
    return leaves.get(name)
