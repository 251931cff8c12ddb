"""Environments as the engine takes them, in this process.

An environment is a `gymnasium.Env` with text spaces, which blocks while it steps. One that takes
well under a millisecond and shares nothing with others may run in the event loop (`InlineEnvs`);
every other belongs into a host process (`EnvHosts` in `hosts.py`), which can be killed when it
hangs.
"""

from collections.abc import Callable

import gymnasium

from flash.errors import EnvFailure
from flash.types import AsyncEnv, Observation, Task

TextEnv = gymnasium.Env[str, str]


def reset(env: TextEnv, task: Task) -> Observation:
    """The first observation of the task's episode."""
    text, info = env.reset(seed=task.seed, options=dict(task.options))
    return Observation(text=text, info=info)


def step(env: TextEnv, action: str) -> Observation:
    """What the environment answers to the action."""
    text, reward, terminated, truncated, info = env.step(action)
    return Observation(
        text=text, reward=float(reward), terminated=terminated, truncated=truncated, info=info
    )


class InlineEnvs:
    """Environments that run in the event loop: for those that never block."""

    def __init__(self, make: Callable[[], TextEnv]) -> None:
        self._make = make

    async def open(self) -> AsyncEnv:
        return _InlineEnv(self._make())


class _InlineEnv:
    def __init__(self, env: TextEnv) -> None:
        self._env = env

    async def reset(self, task: Task) -> Observation:
        try:
            return reset(self._env, task)
        except Exception as error:  # the boundary to the environment's code
            raise EnvFailure(f"reset to {task} raised {error!r}") from error

    async def step(self, action: str) -> Observation:
        try:
            return step(self._env, action)
        except Exception as error:  # the boundary to the environment's code
            raise EnvFailure(f"step({action!r}) raised {error!r}") from error

    def close(self) -> None:
        self._env.close()
