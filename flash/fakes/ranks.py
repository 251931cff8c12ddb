"""Ranks and other processes that keep what they are asked, here and on a node that can be lost."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flash.cluster.hosts import Wanted
from flash.cluster.place import Place
from flash.errors import NodeLost, ProcessEnded, ProcessFailure
from flash.trainer.ranks import LOOPBACK, Meeting, StartedRanks


class FakeRank:
    """A Process of `flash.system.process`.

    Args:
        answers: what each method returns; one that is not here has no end.
    """

    alive = True

    def __init__(self, name: str, answers: Mapping[str, Any]) -> None:
        self.name = name
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self._answers = answers
        self._dead = asyncio.Event()

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        self.calls.append((method, args))
        if method in self._answers and self.alive:
            return self._answers[method]
        async with asyncio.timeout(timeout_s):
            raise await self.wait_dead()

    async def wait_dead(self) -> ProcessFailure:
        await self._dead.wait()
        return ProcessFailure(f"{self.name} was killed")

    async def stop(self, grace_s: float = 5.0) -> None:
        self.kill()

    def kill(self) -> None:
        self.alive = False
        self._dead.set()


class FakeRanks:
    """A RankStarter; `started` has all of its ranks, those of the last start last."""

    nodes = 1
    waits_for = ""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.started: list[FakeRank] = []
        self._answers = answers

    async def start(self, ranks: int, logs: Path) -> StartedRanks:
        new = [FakeRank(f"trainer rank {number}", self._answers) for number in range(ranks)]
        self.started += new
        return StartedRanks(new, [Meeting(LOOPBACK, 1, LOOPBACK)] * ranks)


class FakeNode:
    """Processes of `flash.cluster.far`, on a node that can be lost.

    `starts` has the name of each start with what it has then, by their numbers; `awaited` is set
    while one waits for a node.
    """

    def __init__(self, name: str, answers: Mapping[str, Any]) -> None:
        self.name = name
        self.starts: list[tuple[str, dict[int, FakeRank]]] = []
        self.awaited = asyncio.Event()
        self._answers = answers
        self._there = asyncio.Event()
        self._there.set()

    def lose(self) -> None:
        """With all that is there; until `come_back`."""
        self._there.clear()
        for _, processes in self.starts[-1:]:
            for process in processes.values():
                process.kill()

    def come_back(self) -> None:
        self._there.set()

    async def wait(self) -> None:
        """For a node."""
        self.awaited.set()
        await self._there.wait()
        self.awaited.clear()

    def placed(self) -> Place:
        """Where it is: at another address after each start."""
        return Place(self.name, "1a2b", self.name, f"10.0.0.{len(self.starts)}", 1, 1, ())

    async def call(self, start: str, number: int, method: str, args: Sequence[Any]) -> Any:
        try:
            return await self._process(start, number).call(method, *args)
        except ProcessFailure as killed:
            gone = ProcessEnded(str(killed))
            raise gone if self._there.is_set() else NodeLost(f"{self.name} is lost") from None

    async def wait_dead(self, start: str, number: int) -> str:
        await self._process(start, number).wait_dead()
        if not self._there.is_set():
            raise NodeLost(f"{self.name} is lost")
        return "killed"

    async def kill(self, start: str, number: int) -> None:
        self._process(start, number).kill()

    async def stop(self, start: str, number: int, grace_s: float) -> None:
        await self._process(start, number).stop()

    def _process(self, start: str, number: int) -> FakeRank:
        name, processes = self.starts[-1]
        if name != start or not self._there.is_set():
            raise NodeLost(f"{self.name} is lost")
        return processes[number]


class FakeRanksNode(FakeNode):
    """A RanksNode of `flash.cluster.ranks`.

    Args:
        answers: as of FakeRank.
    """

    async def start(self, name: str, ranks: Sequence[int], logs: str) -> Place:
        await self.wait()
        new = {rank: FakeRank(f"trainer rank {rank}", self._answers) for rank in ranks}
        self.starts.append((name, new))
        return self.placed()


class FakeHostNode(FakeNode):
    """A HostNode of `flash.cluster.hosts`; `ended` tells whether it was.

    Args:
        answers: as of FakeRank.
    """

    ended = False

    async def place(self) -> Place:
        await self.wait()
        return self.placed()

    async def start(self, name: str, number: int, wanted: Wanted) -> tuple[Place, str]:
        await self.wait()
        before = self.starts[-1][1] if self.starts else {}
        self.starts.append((name, before | {number: FakeRank(wanted.name, self._answers)}))
        return self.placed(), ""

    def end(self) -> None:
        self.ended = True
        self.lose()
