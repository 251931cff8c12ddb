"""What a run and `flash eval` share: the hub and all that plays episodes with it.

Config ─► workers.py  hub       ─┐
       ─► model.py    tokenizer, styles
       ─► door.py     door       ├─► agents.py   agents in their environments
       ─► reward.py   rewards   ─┘
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.config import Config
from flash.door import Door
from flash.hub.hub import InferenceHub
from flash.hub.sender import StartSender
from flash.hub.turns import MakeRoom
from flash.hub.worker import Worker
from flash.parts.agents import Agents, Playing, open_agents
from flash.parts.door import open_door
from flash.parts.model import load_tokenizer, make_style
from flash.parts.reward import open_reward
from flash.parts.roles import NONE_EARLIER, Earlier
from flash.parts.workers import open_hub
from flash.system.process import Child, StartProcess
from flash.types import Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """They are open; `agents` opens the environments that a kind of episodes needs as well."""

    hub: InferenceHub
    tokenizer: Any
    door: Door | None
    sets: Mapping[str, Playing]
    earlier: Earlier
    start: StartProcess

    def agents(self, *, heldout: bool = False) -> contextlib.AbstractAsyncContextManager[Agents]:
        """Agents that train, or those of an evaluation."""
        return open_agents(
            self.sets,
            door=self.door,
            hub=self.hub,
            earlier=self.earlier,
            heldout=heldout,
            start=self.start,
        )


@contextlib.asynccontextmanager
async def open_parts(
    config: Config,
    *,
    model: str,
    version: int,
    weights: Callable[[], Awaitable[Weights]],
    log_dir: Path,
    say: Callable[[str], None],
    door_file: Path | None = None,
    senders: Callable[[int], StartSender] | None = None,
    make_room: MakeRoom | None = None,
    earlier: Earlier = NONE_EARLIER,
    start: StartProcess = Child.start,
    fixed: Callable[[Any], Worker] | None = None,
) -> AsyncIterator[Parts]:
    """The parts of a configuration, closed in the end.

    Args:
        model: what workers start with; its tokenizer is everybody's.
        version, weights: of the policy at the start. Workers that run already are given `weights`.
        say: is told which workers these are, and why.
        door_file: where a run tells its door's URL and token.
        senders, make_room: as for the hub's workers.
        earlier: the policies of roles that play what it once was.
        start: starts environment hosts and reward processes.
        fixed: makes, of the tokenizer, a worker that keeps its weights, in the place of others.

    Raises ValueError for what the model or the machine can't do.
    """
    # Not on the loop: they import torch and parsers of calls, for seconds, in which an explorer
    # would not be heard of.
    tokenizer = await asyncio.to_thread(load_tokenizer, model)
    styles = {
        name: await asyncio.to_thread(make_style, of_set, tokenizer)
        for name, of_set in config.own_sets.items()
    }
    async with (
        open_hub(
            config,
            model=model,
            version=version,
            weights=weights,
            log_dir=log_dir,
            say=say,
            senders=senders,
            make_room=make_room,
            fixed=None if fixed is None else fixed(tokenizer),
        ) as hub,
        open_door(config, hub, tokenizer=tokenizer, told_in=door_file) as door,
        contextlib.AsyncExitStack() as opened,
    ):
        sets = {}
        for name, of_set in config.own_sets.items():
            logs = log_dir / name  # of a set without a name it is the run's
            reward = await opened.enter_async_context(
                open_reward(of_set, hub, tokenizer=tokenizer, log_dir=logs, start=start)
            )
            sets[name] = Playing(config=of_set, style=styles[name], reward=reward, log_dir=logs)
        yield Parts(
            hub=hub, tokenizer=tokenizer, door=door, sets=sets, earlier=earlier, start=start
        )
