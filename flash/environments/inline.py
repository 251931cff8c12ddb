"""Environments as the engine takes them, in this process.

An environment is a `gymnasium.Env` with text spaces, which blocks while it steps. One that takes
well under a millisecond and shares nothing with others may run in the event loop (`InlineEnvs`);
every other belongs into a host process (`EnvHosts` in `hosts.py`), which can be killed when it
hangs.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

from flash.environments import boundary
from flash.environments.boundary import TextEnv
from flash.errors import EnvFailure
from flash.types import AsyncEnv, Observation, Task

logger = logging.getLogger(__name__)


class InlineEnvs:
    """Environments that run in the event loop: for those that never block."""

    def __init__(self, make: Callable[[], TextEnv]) -> None:
        self._make = make
        self._close_failed = False

    async def open(self) -> AsyncEnv:
        return _InlineEnv(boundary.make(self._make), self._close)

    def _close(self, env: TextEnv) -> None:
        try:
            boundary.close(env)
        except EnvFailure as failure:
            if not self._close_failed:  # most likely it always does
                self._close_failed = True
                logger.warning("an environment's %s; its episodes count all the same", failure)


class _InlineEnv:
    def __init__(self, env: TextEnv, close: Callable[[TextEnv], None]) -> None:
        self.deterministic = boundary.deterministic(env)
        self._env = env
        self._close = close

    async def reset(self, task: Task) -> Observation:
        return boundary.reset(self._env, task)

    async def step(self, action: str) -> Observation:
        return boundary.step(self._env, action)

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> str | Observation:
        return boundary.call(self._env, tool, arguments)

    def close(self) -> None:
        self._close(self._env)
