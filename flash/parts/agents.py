"""The agents of a run and their environments: those that train, or those on held-out tasks."""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from flash import registry
from flash.config import Config
from flash.door import Door
from flash.door.command import CommandAgent
from flash.door.kept import KeptAgent, kept_environment
from flash.environments.hosts import EnvHosts
from flash.environments.inline import InlineEnvs
from flash.hub.hub import InferenceHub
from flash.parts.model import env_tools
from flash.parts.roles import NONE_EARLIER, Earlier, make_roles
from flash.reward.stage import RewardStage
from flash.roles import Role
from flash.rollout.episode import AgentFactory
from flash.system.process import Child, StartProcess
from flash.tools.tool import CallingStyle
from flash.tools.toolset import Toolset
from flash.types import EnvSource, PromptStyle


@dataclass(frozen=True, slots=True, kw_only=True)
class Playing:
    """What the tasks of a set are played with: their configuration, the prompt style, a reward
    stage if the reward is not the environment's own, and the folder of their processes' logs."""

    config: Config
    style: PromptStyle
    reward: RewardStage | None
    log_dir: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Agents:
    """Makes agents, for each task set, in environments that are open. `hosts`: the processes these
    run in, if any do."""

    make: Mapping[str, AgentFactory]
    hosts: Sequence[EnvHosts] = ()


@contextlib.asynccontextmanager
async def open_agents(
    sets: Mapping[str, Playing],
    *,
    door: Door | None,
    hub: InferenceHub,
    earlier: Earlier = NONE_EARLIER,
    heldout: bool = False,
    start: StartProcess = Child.start,
) -> AsyncIterator[Agents]:
    """Opens environments of the training or the held-out kind, for agents that act in them.

    `hub` has the policy, `earlier` those that it once was; `start` starts the hosts of
    environments that are in some.
    """
    async with contextlib.AsyncExitStack() as opened:
        envs = {
            name: await opened.enter_async_context(_open_envs(playing, start, heldout=heldout))
            for name, playing in sets.items()
        }
        tools = {
            name: await opened.enter_async_context(_open_tools(playing, start))
            for name, playing in sets.items()
        }
        acts = {
            name: await opened.enter_async_context(_open_act(playing, heldout=heldout))
            for name, playing in sets.items()
        }
        yield Agents(
            make={
                name: _factory(
                    playing,
                    envs=envs[name],
                    tools=tools[name],
                    act=acts[name],
                    door=door,
                    roles=make_roles(playing.config.agent.roles, hub=hub, earlier=earlier),
                    heldout=heldout,
                )
                for name, playing in sets.items()
            },
            hosts=[source for source in envs.values() if isinstance(source, EnvHosts)],
        )


def _factory(
    playing: Playing,
    *,
    envs: EnvSource | None,
    tools: "_Tools | None",
    act: Callable[..., Any] | None,
    door: Door | None,
    roles: Mapping[str, Role],
    heldout: bool,
) -> AgentFactory:
    """Makes agents; found by name, because `flash` does not import `flash.agents`."""
    config = playing.config
    settings = config.agent
    common = {
        "max_tokens": settings.max_tokens,
        "max_sequence_tokens": settings.max_sequence_tokens,
        "temperature": config.eval.temperature if heldout else settings.temperature,
        "episode_timeout_s": settings.episode_timeout_s,
        "experts": config.trainer.router_replay and not heldout,
        "reward_stage": playing.reward,
    }
    if act is not None:
        assert door is not None, "it is open wherever an agent of the user's own runs"
        external = registry.agent("external")
        options = _env_options(config, heldout=heldout)
        return lambda: external(door=door, act=act, options=options, roles=roles, **common)
    agent = registry.agent("environment")
    return lambda: agent(
        envs=envs,
        style=playing.style if tools is None else tools.style,
        tools=None if tools is None else tools.tools,
        max_turns=settings.max_turns,
        samples=settings.samples,
        # A host that hangs is found by its own deadline first, which can tell who was working.
        step_timeout_s=settings.step_timeout_s * (2 if config.env.hosts else 1),
        **common,
    )


@contextlib.asynccontextmanager
async def _open_act(playing: Playing, *, heldout: bool) -> AsyncIterator[Callable[..., Any] | None]:
    """The agent of the user's own, if there is one; what it keeps is open."""
    config = playing.config
    run, env = config.agent.run, config.agent.env
    name = "heldout_agent" if heldout else "agent"
    if not run:
        yield None
        return
    if not isinstance(run, str):
        yield CommandAgent(run, log_dir=playing.log_dir, name=name, env=env)
        return
    act: Any = registry.function(run, "agent.run")
    if not inspect.isclass(act):
        yield act
        return
    kept = cast(KeptAgent, act(**_env_options(config, heldout=heldout)))
    log_path = playing.log_dir / f"{name}_0.log"
    start = partial(Child.of_command, log_path=log_path, env=kept_environment(env))
    async with kept.opened(start):
        yield kept


@contextlib.asynccontextmanager
async def _open_envs(
    playing: Playing, start: StartProcess, *, heldout: bool
) -> AsyncIterator[EnvSource | None]:
    """Environments of the training or the held-out kind; in hosts if any are configured.

    None for an agent of the user's own, which brings its world along.
    """
    config = playing.config
    if config.agent.run:
        yield None
        return
    options = _env_options(config, heldout=heldout)
    make: Callable[..., Any] = registry.environment(config.env.name)
    if config.env.hosts == 0:
        yield InlineEnvs(partial(make, **options))
        return
    async with EnvHosts(
        config.env.name,
        options,
        hosts=config.env.hosts,
        call_timeout_s=config.agent.step_timeout_s,
        log_dir=playing.log_dir,
        start=start,
    ) as hosts:
        yield hosts


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tools:
    """Tools that are open, and the prompt style that knows them."""

    tools: Toolset
    style: CallingStyle


@contextlib.asynccontextmanager
async def _open_tools(playing: Playing, start: StartProcess) -> AsyncIterator[_Tools | None]:
    """What the policy can call, if anything; ValueError for a model that calls no tools."""
    settings, of_env = playing.config.agent, env_tools(playing.config)
    if not (settings.has_tools or of_env):
        yield None
        return
    async with Toolset(
        settings.tools,
        settings.mcp,
        of_env=of_env,
        processes=settings.tool_processes,
        sandbox=None if settings.sandbox == "none" else settings.sandbox,
        timeout_s=settings.tool_timeout_s,
        max_chars=settings.tool_chars,
        log_dir=playing.log_dir,
        start=start,
    ) as tools:
        assert isinstance(playing.style, CallingStyle), "as check_tools has seen to"
        style = await asyncio.to_thread(playing.style.calling, tools.schemas)
        yield _Tools(tools=tools, style=style)


def _env_options(config: Config, *, heldout: bool) -> dict[str, Any]:
    """What the environment is made with; an agent of the user's own is told."""
    return config.env.options | (config.env.eval_options if heldout else {})
