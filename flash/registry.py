"""Finds environments and prompt styles by name, so that a user's own package plugs in like ours.

A name is an entry point (groups `flash.envs`, `flash.agents`, `flash.styles`) or `module:Class`.
"""

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from flash.errors import one_line
from flash.system import machine

_ENVS, _AGENTS, _STYLES = "flash.envs", "flash.agents", "flash.styles"


def environment(name: str) -> Any:
    """The environment class of that name. ValueError lists what there is."""
    return _find(_ENVS, name, "env.name")


def is_environment(name: str) -> bool:
    """Whether an environment is registered by that name."""
    return name in entry_points(group=_ENVS).names


def style(name: str) -> Any:
    """The prompt style of that name: a callable that takes a tokenizer."""
    return _find(_STYLES, name, "agent.style")


def agent(name: str) -> Any:
    """The agent class of that name."""
    return _find(_AGENTS, name, "agent")


def function(name: str, field: str, of: str = "") -> Any:
    """What can be called by that name, `module:attribute`. ValueError if there is nothing.

    `of`: what it must take, and nothing else, if that is to be checked.
    """
    module, _, attribute = name.partition(":")
    given = f"{field}={name!r}"
    try:
        found = _import(module, given)
        with _users_code(given):  # a module may have code for its attributes
            is_there = hasattr(found, attribute)
    except ImportError as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{given} can't be imported: {why}: {_remedy(name, error)}") from error
    if not is_there:
        near = difflib.get_close_matches(attribute, dir(found), n=1)
        hint = f"did you mean {module}:{near[0]}?" if near else "name a class or function of it"
        raise ValueError(f"{given} can't be imported: {module} has no {attribute!r}: {hint}")
    return _callable(getattr(found, attribute), given, of)


def _find(group: str, name: str, field: str) -> Any:
    if ":" in name:
        return function(name, field)
    found = entry_points(group=group)
    if name not in found.names:
        near = difflib.get_close_matches(name, found.names, n=1)
        hint = f"did you mean {near[0]}?" if near else "or name your own as module:Class"
        known = ", ".join(sorted(found.names))
        raise ValueError(f"{field}={name!r} is not registered; there are {known}; {hint}")
    try:
        with _users_code(f"{field}={name!r}"):
            return _callable(found[name].load(), f"{field}={name!r}")
    except ImportError as error:
        raise missing_package(field, name, error) from error


def _callable(found: Any, given: str, of: str = "") -> Any:
    if not callable(found):
        raise ValueError(
            f"{given} is a {type(found).__name__}, which can't be called: name a class or function"
        )
    if of:
        try:
            inspect.signature(found).bind(None)
        except TypeError as error:
            raise ValueError(f"{given} must take {of}: {error}") from None
        except ValueError:
            pass  # some built-in functions don't tell
    return found


def _import(module: str, given: str) -> ModuleType:
    """The module; also one that lies where the command is run, where commands do not look.

    Only for a module that the user named and nothing installed provides: with the folder always
    on the path, any file in it could be run in the place of a package that is not there.
    """
    if not all(part.isidentifier() for part in module.split(".")):
        raise ImportError(f"{module!r} is no module's name")
    top, here = module.partition(".")[0], Path.cwd()
    if importlib.util.find_spec(top) is None and any(
        (here / name).exists() for name in (top, f"{top}.py")
    ):
        sys.path.append(str(here))
    with _users_code(given):
        return importlib.import_module(module)


def _remedy(name: str, error: ImportError) -> str:
    """Against a module that is not there, or that lacks something itself."""
    path, _, attribute = name.partition(":")
    if path.endswith(".py"):
        module = path.removesuffix(".py").removeprefix("./").replace("/", ".")
        return f"did you mean {module}:{attribute}?"
    if error.name and not f"{path}.".startswith(f"{error.name}."):
        return f"install what has {error.name}"
    return "write module:name, of a module that is installed or in this folder"


@contextlib.contextmanager
def _users_code(given: str) -> Iterator[None]:
    """Around an import that runs what a user wrote: it may raise anything, or call sys.exit.

    An ImportError passes: what it means depends on whose module it is. Anything else is a
    ValueError that names the line at fault.
    """
    try:
        yield
    except (ImportError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the boundary to the module's code; it may skip, or exit
        raise ValueError(
            f"{given} can't be imported: {said_and_where(error)}: mend it, or name another"
        ) from error


def said_and_where(error: BaseException) -> str:
    """An error of a user's code in one line: its type, what it says, and its file and line."""
    if isinstance(error, SyntaxError):
        where = f" in {error.filename}, line {error.lineno}" if error.filename else ""
        return f"{type(error).__name__}: {error.msg}{where}"
    frames = traceback.extract_tb(error.__traceback__)
    # Of the import itself nobody wants to know.
    last = next((f for f in reversed(frames) if not f.filename.startswith("<frozen")), frames[-1])
    return f"{one_line(error)} in {last.filename}, line {last.lineno}"


def missing_package(field: str, name: str, error: ImportError) -> ValueError:
    """The error of a part whose own dependencies are not installed."""
    how = machine.how_to_install("alfworld,reasoning,textarena,gem,openenv")
    return ValueError(
        f"{field}={name!r} needs a package that is not installed ({error}): run {how}, or install "
        f"that package"
    )
