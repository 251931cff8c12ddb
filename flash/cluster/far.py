"""Processes on another node, as if they ran here: what has them there, and what stands for one.

    caller ─► FarProcess ─► HasProcesses, a role of that node ─► Child

A start has a name, by which a role knows whose processes it has; whoever still calls one of an
earlier start is told so. What a process answers is read on its own node, as that of a child here.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any, Protocol

from flash.errors import NodeLost, ProcessEnded, ProcessFailure
from flash.system.process import Process


class Processes(Protocol):
    """What has processes on another node: a HasProcesses, wherever that is.

    All raise NodeLost if the node is, ProcessEnded if the process alone has ended.
    """

    @property
    def name(self) -> str: ...

    async def call(self, start: str, number: int, method: str, args: Sequence[Any]) -> Any: ...

    async def wait_dead(self, start: str, number: int) -> str: ...

    async def kill(self, start: str, number: int) -> None: ...

    async def stop(self, start: str, number: int, grace_s: float) -> None: ...


class HasProcesses:
    """Has processes on its node; its methods are called from elsewhere.

    Args:
        name: of this role.
        of: what its processes are.
    """

    def __init__(self, name: str, of: str) -> None:
        self.name = name
        self._of = of
        self._start = ""
        self._processes: dict[int, Process] = {}

    async def call(self, start: str, number: int, method: str, args: Sequence[Any]) -> Any:
        process = self._process(start, number)
        try:
            return await process.call(method, *args)
        except ProcessFailure as failure:
            if process.alive:
                raise
            raise ProcessEnded(str(failure)) from None

    async def wait_dead(self, start: str, number: int) -> str:
        """Why it has ended, once it has."""
        return str(await self._process(start, number).wait_dead())

    async def kill(self, start: str, number: int) -> None:
        self._process(start, number).kill()

    async def stop(self, start: str, number: int, grace_s: float) -> None:
        await self._process(start, number).stop(grace_s)
        if start == self._start:
            self._processes.pop(number, None)

    def _process(self, start: str, number: int) -> Process:
        if start != self._start or number not in self._processes:
            raise ProcessEnded(
                f"{self._of} {number} has ended: {self.name} has started anew since, or another "
                f"has taken its place"
            )
        return self._processes[number]


class FarProcess:
    """A process of another node, as if it ran here."""

    def __init__(self, name: str, node: Processes, start: str, number: int) -> None:
        self.name = name
        self._node = node
        self._key = (start, number)
        self._dead: ProcessFailure | None = None
        self._killing: asyncio.Task[None] | None = None
        self._watching = asyncio.create_task(self._watch(), name=f"watch {name}")

    @property
    def alive(self) -> bool:
        return self._dead is None

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        if self._dead is not None:
            raise self._dead
        async with asyncio.timeout(timeout_s):
            try:
                return await self._node.call(*self._key, method, args)
            except ProcessEnded as gone:  # it is known at once, not when the watch hears of it
                raise self._ended(gone) from None

    async def wait_dead(self) -> ProcessFailure:
        await asyncio.wait((self._watching,))
        assert self._dead is not None
        return self._dead

    async def stop(self, grace_s: float = 5.0) -> None:
        """No longer than a moment more than that: a node may be lost and nobody know it yet."""
        with contextlib.suppress(ProcessFailure, TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._node.stop(*self._key, grace_s)
        self._dead = self._dead or ProcessFailure(f"{self.name} was ended")
        left = [task for task in (self._watching, self._killing) if task is not None]
        for task in left:
            task.cancel()
        await asyncio.wait(left)

    def kill(self) -> None:
        if self._killing is None and self._dead is None:
            self._killing = asyncio.create_task(self._kill(), name=f"kill {self.name}")

    async def _kill(self) -> None:
        with contextlib.suppress(ProcessFailure):  # it is dead
            await self._node.kill(*self._key)

    async def _watch(self) -> None:
        try:
            self._ended(ProcessEnded(await self._node.wait_dead(*self._key)))
        except ProcessFailure as gone:
            self._ended(gone)

    def _ended(self, gone: ProcessFailure) -> ProcessFailure:
        if self._dead is None:
            lost = isinstance(gone, NodeLost)
            self._dead = NodeLost(f"{self.name}: {gone}") if lost else gone
        self._watching.cancel()
        return self._dead
