"""Where a configuration comes from: presets, YAML files, and what the command line changes."""

import difflib
import os
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from flash.config.mistakes import validated
from flash.config.names import BARE, without_aliases
from flash.config.run import Config
from flash.config.yaml_text import plain_values

_MOST_BYTES = 1 << 20  # what is larger is no file of settings, and YAML is read slowly


def presets() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = resources.files("flash.presets")
    return {Path(str(f)).stem: Path(str(f)) for f in folder.iterdir() if str(f).endswith(".yaml")}


def load(source: str | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a preset or a YAML file, with `overrides` by dotted name.

    With no source there are only the overrides and the defaults.
    Raises ValueError with a line for each mistake: the field, the value and the remedy.
    """
    settings = without_aliases(_read(source)) if source is not None else {}
    return parse(changed(settings, overrides or {}))


def changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested plain values with some changed, by dotted name. ValueError for a field given twice."""
    settings = dict(settings)
    for name, value in each_once(without_aliases(changes)):
        _set(settings, name.split("."), value)
    return settings


def parse(settings: Mapping[str, Any]) -> Config:
    """The validated configuration of nested plain values; errors as for `load`."""
    return validated(Config, settings)


def _read(source: str) -> dict[str, Any]:
    known = presets()
    path = known.get(source, Path(source))
    if not os.path.exists(path) or path.is_dir():
        near = difflib.get_close_matches(source, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if os.path.isfile(path / "config.yaml"):
            hint = f": of a run give {path / 'config.yaml'}"
        raise ValueError(
            f"{source!r} is neither a preset ({', '.join(sorted(known))}) nor a YAML file{hint}"
        )
    # A run is named after what it ran, unless it says otherwise.
    return {"name": path.stem, **read_mapping(path, "env: NAME")}


def read_mapping(path: Path, example: str) -> dict[str, Any]:
    """What a YAML file holds. ValueError if that is no mapping, with an example of one."""
    settings = plain_values(text_of(path), str(path))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values, at least {example}")
    return settings


def text_of(path: Path) -> str:
    """What a file of settings says. ValueError if it is none, or can't be read."""
    try:
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no regular file"
            raise ValueError(f"{path} is {kind}: name a YAML file")
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise ValueError(
                f"{path} has {size:,} bytes, and settings have {_MOST_BYTES:,} at most: name the "
                f"YAML file of the settings"
            )
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"{path} can't be read: {error.strerror}: name a YAML file that you may read"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 (byte {error.start}): name a YAML file, saved as UTF-8"
        ) from error


def each_once(changes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Changes by dotted name, sections before what they hold, whatever their order was.

    ValueError for a field that is given by itself and by its section.
    """
    ordered = sorted(changes.items(), key=lambda change: change[0].count("."))
    given: dict[str, str] = {}
    for name, value in ordered:
        for field in _fields_in(name, value):
            if (before := given.setdefault(field, name)) != name:
                raise ValueError(f"{field} is given twice, by {before} and {name}: give it once")
    return ordered


def _fields_in(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _fields_in(f"{name}.{key}", inner)
    elif isinstance(value, str) and (bare := BARE.get(name.rpartition(".")[2])):
        yield f"{name}.{bare}"
    else:
        yield name


def _set(settings: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets a nested value; a bare kind, of engine or cluster, changes the kind, a bare environment
    all of it."""
    *sections, last = path
    if path in (["engine"], ["cluster"]) and isinstance(value, str):
        sections, last = path, "kind"
    for depth, section in enumerate(sections):
        inner = settings.get(section)
        if isinstance(inner, str) and section in BARE:
            inner = {BARE[section]: inner}
        if not isinstance(inner, dict | None):
            name = ".".join(sections[: depth + 1])
            raise ValueError(f"{name}.{last}: unknown field; {name} is a value, not a section")
        settings[section] = inner = dict(inner or {})
        settings = inner
    settings[last] = value
