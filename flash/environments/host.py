"""The environment host: a process that holds many environments and drives one at a time."""

from collections.abc import Mapping
from typing import Any

from flash import registry
from flash.environments import inline
from flash.process import serve
from flash.types import Observation, Task


class EnvHost:
    """Answers the calls of `flash.environments.hosts.EnvHosts`."""

    def __init__(self) -> None:
        self._envs: dict[int, inline.TextEnv] = {}

    def configure(self, name: str, options: Mapping[str, Any]) -> None:
        self._make = registry.environment(name)
        self._options = dict(options)

    def open(self, env_id: int) -> None:
        self._envs[env_id] = self._make(**self._options)

    def reset(self, env_id: int, task: Task) -> Observation:
        return inline.reset(self._envs[env_id], task)

    def step(self, env_id: int, action: str) -> Observation:
        return inline.step(self._envs[env_id], action)

    def close(self, env_id: int) -> None:
        self._envs.pop(env_id).close()


if __name__ == "__main__":
    serve(EnvHost())
