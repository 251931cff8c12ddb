"""Whether what a run names can be called as it will be: an agent, an environment, a style."""

import contextlib
import difflib
import importlib.util
import inspect
import shutil
from collections.abc import Mapping
from typing import Any

from flash import registry
from flash.config.agent import AgentConfig
from flash.config.fields import RunFields
from flash.environments.config import EnvConfig
from flash.errors import EnvFailure
from flash.sandbox import SandboxUnavailable
from flash.sandbox.bubblewrap import check_installed
from flash.system import machine


def check_run(config: RunFields) -> None:
    """That the user's agent can be started, and that no setting speaks of another's."""
    run = config.agent.run
    act: Any = registry.function(run, "agent.run") if run and isinstance(run, str) else None
    if config.agent.env and not (isinstance(run, tuple) or inspect.isclass(act)):
        raise ValueError(
            f"agent.env={list(config.agent.env)} is for agents that are commands, and agent.run="
            f"{run!r} is none: leave it out"
        )
    if not run:
        if config.agent.roles:
            raise ValueError(
                f"agent.roles={list(config.agent.roles)} are for an agent of your own (agent.run): "
                f"leave them out"
            )
        return
    takes = ("roles", "task") if config.agent.roles else ("base_url", "api_key", "task")
    if isinstance(run, tuple):
        if shutil.which(run[0]) is None:
            raise ValueError(
                f"agent.run={list(run)!r}: the command {run[0]!r} is not installed: "
                f"install it, or give its path"
            )
    else:
        is_kept = inspect.isclass(act) and hasattr(act, "opened")
        played = act.__call__ if is_kept else act
        if not inspect.iscoroutinefunction(played):
            raise ValueError(f"agent.run={run!r} is not a coroutine function: write async def")
        try:
            inspect.signature(played).bind(*[None] * is_kept, **dict.fromkeys(takes))
        except TypeError as error:
            raise ValueError(
                f"agent.run={run!r} must take {', '.join(takes[:-1])} and {takes[-1]}: {error}"
            ) from None
        if is_kept:
            check_arguments(act, config.env.options, "env.options")
            check_arguments(act, config.env.options | config.env.eval_options, "env.eval_options")
    for field, given in (
        ("agent.max_turns", config.agent.max_turns is not None),
        ("agent.samples", config.agent.samples != "whole"),
        ("agent.tools", bool(config.agent.tools)),
        ("agent.mcp", bool(config.agent.mcp)),
        ("agent.sandbox", config.agent.sandbox != "none"),
        ("env.hosts", config.env.hosts > 0),
    ):
        if given:
            raise ValueError(f"{field} is not for an agent of your own (agent.run): leave it out")
    if config.trainer.advantages.of_turns:
        raise ValueError(
            f"trainer.advantages.name={config.trainer.advantages.name} takes the rewards of turns, "
            f"and an agent of your own (agent.run) has one for its episode: use grpo, rloo or "
            f"reinforce"
        )


def check_tools(agent: AgentConfig, env: EnvConfig) -> None:
    """That the agent's tools and its environment's are there, and that its style can offer them."""
    of_env = not agent.run and hasattr(registry.environment(env.name), "tools")
    in_sandbox = agent.sandbox != "none"
    if in_sandbox and not agent.has_tools:
        raise ValueError(
            f"agent.sandbox={agent.sandbox} is for what agent.tools and agent.mcp name, and they "
            f"are empty: leave it out"
        )
    if not agent.has_tools and not of_env:
        return
    from flash.tools.environment import offered_by  # noqa: PLC0415  (seconds to import)
    from flash.tools.functions import function_of  # noqa: PLC0415  (seconds to import)

    if not hasattr(registry.style(agent.style), "calling"):
        who = f"env.name={env.name!r}" if of_env else "agent.tools or agent.mcp"
        raise ValueError(
            f"agent.style={agent.style!r} offers no tools, and {who} has some: set agent.style=chat"
        )
    if of_env:
        offered_by(env.name)
    for name in agent.tools:
        function_of(name)
    if in_sandbox:
        try:
            check_installed()
        except SandboxUnavailable as error:
            raise ValueError(f"agent.sandbox={agent.sandbox}: {error}") from error
    if agent.mcp and importlib.util.find_spec("mcp") is None:
        raise ValueError(
            f"agent.mcp needs a package that is not installed: run {machine.how_to_install('mcp')}"
        )


def check_arguments(make: Any, options: Mapping[str, Any], field: str) -> None:
    """ValueError for an option that `make` does not take."""
    try:
        parameters = dict(inspect.signature(make).parameters)
    except ValueError:
        return  # some built-in types don't tell
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    what = "environment"
    if field == "agent.style_options":
        what = "style"
        parameters.pop(next(iter(parameters), ""), None)  # the tokenizer, which is ours to give
    for name in options:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1, cutoff=0.6)
            takes = f"it takes {', '.join(parameters) or 'none'}"
            hint = f"did you mean {near[0]}?" if near else takes
            if field == "env.eval_options" and not near:
                hint += "; with --env.eval_options '{}' evaluation is on what it trains on"
            raise ValueError(f"{field}.{name} is not an argument of the {what}: {hint}")


def try_environments(config: RunFields) -> None:
    """Makes each environment once for training and once for evaluation, to see that it can be.

    Agents that are kept, too. Takes seconds where they import much. ValueError says what a
    constructor objects to.
    """
    for name, of_set in config.own_sets.items():
        try:
            if of_set.uses_environment:
                try_environment(of_set.env)
            _try_kept(of_set.agent, of_set.env)
        except ValueError as error:
            if not name:
                raise
            raise ValueError(f"task_sets.{name}: {error}") from error


def _try_kept(agent: AgentConfig, env: EnvConfig) -> None:
    if not isinstance(agent.run, str) or not agent.run:
        return
    make: Any = registry.function(agent.run, "agent.run")
    if inspect.isclass(make):
        from flash.door.kept import kept_environment  # noqa: PLC0415  (imports a server)

        for field, options in (
            ("env.options", env.options),
            ("env.eval_options", env.options | env.eval_options),
        ):
            try:
                kept: Any = make(**options)
                kept.check(kept_environment(agent.env))
            except ValueError as error:
                raise ValueError(f"{field}: {' '.join(str(error).split())}") from error
            except TypeError as error:  # it need not name the value
                raise ValueError(f"{field}={options}: {' '.join(str(error).split())}") from error


def try_environment(env: EnvConfig) -> None:
    from flash.environments import boundary  # noqa: PLC0415  (imports gymnasium)

    make = registry.environment(env.name)
    for field, options in (
        ("env.options", env.options),
        ("env.eval_options", env.options | env.eval_options),
    ):
        try:
            made = make(**options)
        except ImportError as error:
            raise registry.missing_package("env.name", env.name, error) from error
        except ValueError as error:
            raise ValueError(f"{field}: {' '.join(str(error).split())}") from error
        except TypeError as error:  # it need not name the value
            raise ValueError(f"{field}={options}: {' '.join(str(error).split())}") from error
        except (Exception, SystemExit) as error:  # the boundary to the environment's code
            raise ValueError(
                f"env.name={env.name!r} can't be made with {field}={options}: "
                f"{registry.said_and_where(error)}: mend it, or change them"
            ) from error
        if lacks := [name for name in ("reset", "step", "close") if not hasattr(made, name)]:
            raise ValueError(
                f"env.name={env.name!r} is not an environment: it lacks {', '.join(lacks)}; name a "
                f"class with the methods of a gymnasium.Env"
            )
        if env.hosts == 0 and boundary.blocks(made):
            raise ValueError(
                f"env.hosts=0 would have env.name={env.name!r} wait in the event loop, and all "
                f"episodes with it: set env.hosts to the number of episodes that may wait at once"
            )
        with contextlib.suppress(EnvFailure):  # harms no episode, and is told in the run
            boundary.close(made)
