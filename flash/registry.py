"""Finds environments and prompt styles by name, so that a user's own package plugs in like ours.

A name is an entry point (groups `flash.envs`, `flash.agents`, `flash.styles`) or `module:Class`.
"""

import importlib
from importlib.metadata import entry_points
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


def _find(group: str, name: str, field: str) -> Any:
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{field}={name!r} can't be imported: {error}") from error
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


def missing_package(field: str, name: str, error: ImportError) -> ValueError:
    """The error of a part whose own dependencies are not installed."""
    return ValueError(
        f"{field}={name!r} needs a package that is not installed ({error}): run make setup, or "
        f"pip install 'flash-rl[alfworld,reasoning]'"
    )
