"""Where a configuration comes from: presets, YAML files, and what the command line changes."""

import difflib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from flash.config.mistakes import validated
from flash.config.names import BARE, without_aliases
from flash.config.run import Config


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
    for name, value in without_aliases(overrides or {}).items():
        _set(settings, name.split("."), value)
    return parse(settings)


def parse(settings: Mapping[str, Any]) -> Config:
    """The validated configuration of nested plain values; errors as for `load`."""
    return validated(Config, settings)


def _read(source: str) -> dict[str, Any]:
    known = presets()
    path = known.get(source, Path(source))
    if not path.is_file():
        near = difflib.get_close_matches(source, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        if (path / "config.yaml").is_file():
            hint = f": of a run give {path / 'config.yaml'}"
        raise ValueError(
            f"{source!r} is neither a preset ({', '.join(sorted(known))}) nor a YAML file{hint}"
        )
    # A run is named after what it ran, unless it says otherwise.
    return {"name": path.stem, **read_mapping(path, "env: NAME")}


def read_mapping(path: Path, example: str) -> dict[str, Any]:
    """What a YAML file holds. ValueError if that is no mapping, with an example of one."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values, at least {example}")
    return settings


def _set(settings: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets a nested value; a bare engine kind changes the kind, a bare environment all of it."""
    *sections, last = path
    if path == ["engine"] and isinstance(value, str):
        sections, last = ["engine"], "kind"
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
