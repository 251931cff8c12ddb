"""An agent of the user's own that is kept from its first episode to its last."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from flash.door.command import environment_of
from flash.system.process import Answers, Process
from flash.types import Task


class StartCommand(Protocol):
    """Starts a program that answers calls, as `Child.of_command` does, with the run's log."""

    async def __call__(self, command: Sequence[str], *, name: str, answers: Answers) -> Process: ...


class KeptAgent(Protocol):
    """What a class that `agent.run` names makes of the environment's options.

    There is one for training, and one for evaluation. Its constructor raises ValueError for options
    that are wrong.
    """

    def check(self, env: Mapping[str, str]) -> None:
        """ValueError for what it needs and is not there: before models are loaded.

        `env`: the variables of the programs that it starts.
        """
        ...

    def opened(self, start: StartCommand) -> AbstractAsyncContextManager[object]:
        """While episodes are played: what it keeps is there."""
        ...

    async def __call__(self, *, task: Task, **access: Any) -> Any:
        """One episode, as of an agent that is a coroutine function."""
        ...


def kept_environment(listed: Sequence[str]) -> dict[str, str]:
    """The environment variables of programs that it starts: a command's, but not those that say
    where this interpreter finds packages."""
    return environment_of(listed, but=("PYTHONPATH", "VIRTUAL_ENV"))
