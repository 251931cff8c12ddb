"""Finds environments and prompt styles by name, so that a user's own package plugs in like ours.

A name is an entry point (groups `flash.envs`, `flash.agents`, `flash.styles`) or `module:Class`.
"""

import importlib
import importlib.util
import inspect
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

_ENVS, _AGENTS, _STYLES = "flash.envs", "flash.agents", "flash.styles"


def environment(name: str) -> Any:
    """The environment class of that name. ValueError lists what there is."""
    return _find(_ENVS, name, "env.name")


def style(name: str) -> Any:
    """The prompt style of that name: a callable that takes a tokenizer."""
    return _find(_STYLES, name, "agent.style")


def agent(name: str) -> Any:
    """The agent class of that name."""
    return _find(_AGENTS, name, "agent")


def function(name: str, field: str, of: str = "") -> Any:
    """The attribute of that name, `module:attribute`. ValueError if it can't be imported.

    `of`: what it must take, and nothing else, if that is to be checked.
    """
    module, _, attribute = name.partition(":")
    try:
        found = getattr(_import(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{field}={name!r} can't be imported: {error}") from error
    if of:
        try:
            inspect.signature(found).bind(None)
        except TypeError as error:
            raise ValueError(f"{field}={name!r} must take {of}: {error}") from None
    return found


def _find(group: str, name: str, field: str) -> Any:
    if ":" in name:
        return function(name, field)
    found = entry_points(group=group)
    if name not in found.names:
        raise ValueError(
            f"{field}={name!r} is not registered; there are {', '.join(sorted(found.names))}, or "
            f"name your own as module:Class"
        )
    try:
        return found[name].load()
    except ImportError as error:
        raise missing_package(field, name, error) from error


def _import(module: str) -> ModuleType:
    """The module; also one that lies where the command is run, where commands do not look.

    Only for a module that the user named and nothing installed provides: with the folder always
    on the path, any file in it could be run in the place of a package that is not there.
    """
    top, here = module.partition(".")[0], Path.cwd()
    if importlib.util.find_spec(top) is None and any(
        (here / name).exists() for name in (top, f"{top}.py")
    ):
        sys.path.append(str(here))
    return importlib.import_module(module)


def missing_package(field: str, name: str, error: ImportError) -> ValueError:
    """The error of a part whose own dependencies are not installed."""
    return ValueError(
        f"{field}={name!r} needs a package that is not installed ({error}): run make setup, or "
        f"pip install 'flash-rl[alfworld,reasoning]'"
    )
