"""What tasks are made from. The seeds of a run name the same tasks as long as that is the same.

A file may be moved, or copied to another machine: its content counts, not its name or its date.
"""

import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from flash.config.fields import RunFields
from flash.config.resumed import is_free, shown
from flash.config.task_sets import PlayedWith

_SETS = "task_sets."
_BLOCK = 1 << 20
_MOST_BLOCKS = 64  # of a file; of a larger one so many are read, evenly apart
_MOST_FILES = 20_000  # of a folder; the first, by name
_OF_A_MACHINE = ("reward.url", "agent.env", "agent.mcp")


class _Content(msgspec.Struct, frozen=True):
    """Of a file; of a folder: of the names and sizes of the files in it."""

    files: int
    bytes: int
    sum: int

    def __str__(self) -> str:
        files = f"{self.files:,} files of " if self.files else ""
        return f"{files}{self.bytes:,} bytes"


class _Source(msgspec.Struct, frozen=True):
    values: dict[str, Any]  # by field
    contents: dict[str, _Content]  # of the files that some of the values name


def source_of(config: RunFields) -> str:
    """What the tasks of a run are made from, as a text to keep: the environment, its options, and
    the content of files and folders that these name; likewise an agent of the user's own.

    It reads such files, so call it in a thread: 100,000 questions take 20 ms. Of a file above 64
    MiB it reads as much, in places; of a folder the names and sizes.
    """
    values: dict[str, Any] = {}
    for name, of_set in config.own_sets.items():
        prefix = _of_set(name)
        values[f"{prefix}env.name"] = of_set.env.name
        options = of_set.env.model_dump(mode="json")["options"]
        values |= dict(_leaves(f"{prefix}env.options", options))
        values |= dict(_leaves(f"{prefix}agent.run", of_set.agent.run))
    return _source(values)


def source_of_brought(given: PlayedWith) -> str:
    """Likewise of all that the tasks of a set are played with, as far as it was given and what is
    learned depends on it. It names no keys, no addresses, and nothing that an agent has of its
    surroundings."""
    values: dict[str, Any] = {}
    for section, fields in given.model_dump(mode="json").items():
        for field, value in fields.items():
            if not is_free(name := f"{section}.{field}") and name not in _OF_A_MACHINE:
                values |= dict(_leaves(name, value))
    return _source(values)


def _source(values: dict[str, Any]) -> str:
    contents = {
        field: content
        for field, value in values.items()
        if isinstance(value, str) and (content := _content(value)) is not None
    }
    return msgspec.json.encode(_Source(values, contents)).decode()


def value_in(source: str, field: str) -> Any:
    """What a source says of that field; None if it does not."""
    return msgspec.json.decode(source, type=_Source).values.get(field)


def changed_source(before: str, now: str, *, task_set: str | None = None) -> str:
    """What makes one source of tasks another than that before, in words; empty if nothing does.
    With `task_set` of that one's tasks alone.

    Both are from `source_of`, or both from `source_of_brought`; ValueError if `before` is not.
    """
    was, new = (msgspec.json.decode(text, type=_Source) for text in (before, now))
    fields = [
        field
        for field in dict.fromkeys((*was.values, *new.values))
        if task_set is None or _is_of(field, task_set)
    ]
    return ", ".join(filter(None, (_changed(field, was, new) for field in fields)))


def _of_set(name: str) -> str:
    """What its fields begin with; those of a run without sets are its own."""
    return f"{_SETS}{name}." if name else ""


def _is_of(field: str, task_set: str) -> bool:
    return field.startswith(_of_set(task_set)) and bool(task_set) == field.startswith(_SETS)


def _changed(field: str, was: _Source, now: _Source) -> str:
    """What is otherwise about a field; empty if nothing is."""
    before, after = was.contents.get(field), now.contents.get(field)
    told = shown(now.values.get(field))
    if before is None and after is None:
        same = was.values.get(field) == now.values.get(field)
        return "" if same else f"{field} {shown(was.values.get(field))} → {told}"
    if before == after:
        return ""
    if before is None or after is None:
        there = "is not there any more" if after is None else "is new there"
        return f"{field}: {shown(was.values[field]) if after is None else told} {there}"
    if (before.files, before.bytes) != (after.files, after.bytes):
        return f"{field}: {told} has {after}, and had {before}"
    return f"{field}: {told} has other content of the same size"


def _leaves(field: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What is in a nested value, by dotted names."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{field}.{name}", inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, inner in enumerate(value):
            yield from _leaves(f"{field}.{number}", inner)
    elif value != "":
        yield field, value


def _content(value: str) -> _Content | None:
    """Of the file or folder that a text names; None if it names none that can be read."""
    try:
        path = Path(value).expanduser()
        if path.is_dir():
            return _of_folder(path)
        return _of_file(path) if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long a name, no right to it, no home
        return None


def _of_file(path: Path) -> _Content:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        blocks = -(-size // _BLOCK)
        last = min(blocks, _MOST_BLOCKS) - 1
        found = 0
        for number in range(last + 1):
            file.seek(number * max(0, size - _BLOCK) // max(1, last))
            found = zlib.crc32(file.read(_BLOCK), found)
    return _Content(files=0, bytes=size, sum=found)


def _of_folder(path: Path) -> _Content:
    files = total = found = 0
    for folder, inner, names in os.walk(path):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(name for name in names if not name.startswith(".")):
            if files == _MOST_FILES:
                return _Content(files, total, found)
            place = os.path.join(folder, name)
            size = os.stat(place).st_size if os.path.exists(place) else 0  # a link to nowhere
            seen = f"{os.path.relpath(place, path)} {size}\n".encode(errors="surrogateescape")
            files, total, found = files + 1, total + size, zlib.crc32(seen, found)
    return _Content(files, total, found)
