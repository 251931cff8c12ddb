"""The environment host: a process that holds many environments and drives one at a time."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from flash import registry
from flash.environments import boundary
from flash.system.process import serve, written
from flash.types import Observation, Task


class EnvHost:
    """Answers the calls of `flash.environments.hosts.EnvHosts`, with what these methods return."""

    def __init__(self) -> None:
        self._envs: dict[int, boundary.TextEnv] = {}

    def configure(self, name: str, options: Mapping[str, Any]) -> None:
        self._make = partial(registry.environment(name), **options)

    def open(self, env_id: int) -> bool:
        """A new environment; answers whether it is deterministic."""
        env = self._envs[env_id] = boundary.make(self._make)
        return boundary.deterministic(env)

    def reset(self, env_id: int, task: Task) -> Observation:
        return boundary.reset(self._envs[env_id], task)

    def step(self, env_id: int, action: str) -> Observation:
        return boundary.step(self._envs[env_id], action)

    def call(self, env_id: int, tool: str, arguments: Mapping[str, Any]) -> str | Observation:
        return boundary.call(self._envs[env_id], tool, arguments)

    def close(self, env_id: int) -> None:
        boundary.close(self._envs.pop(env_id))


if __name__ == "__main__":
    serve(EnvHost(), write=written)
