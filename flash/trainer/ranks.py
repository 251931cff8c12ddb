"""Where a trainer's ranks are: processes on this machine, or elsewhere by another starter.

Trainer ─► RankStarter ─► Process × ranks, which find each other at rank 0's node
"""

import asyncio
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from flash.system.process import Child, Process

LOOPBACK = "127.0.0.1"


class Meeting(NamedTuple):
    """Where a rank finds the others: rank 0 listens at a host; its own node is at `address`."""

    host: str
    port: int
    address: str


@dataclass(frozen=True, slots=True)
class StartedRanks:
    """All ranks of a start, in their order, and where each finds the others."""

    ranks: Sequence[Process]
    meetings: Sequence[Meeting]


class RankStarter(Protocol):
    """Starts a trainer's ranks, again and again."""

    @property
    def nodes(self) -> int:
        """How many machines have ranks, as many each."""
        ...

    @property
    def waits_for(self) -> str:
        """What a start waits for that may take any time, as a node to come; empty if nothing."""
        ...

    async def start(self, ranks: int, logs: Path) -> StartedRanks:
        """That many, rank 0 on this machine; none is left of an earlier start.

        OSError if a machine has no room for them.
        """
        ...


class LocalRanks:
    """Processes on this machine, which others reach at `address`."""

    nodes = 1
    waits_for = ""

    def __init__(self, address: str = LOOPBACK) -> None:
        self._address = address

    async def start(self, ranks: int, logs: Path) -> StartedRanks:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        with socket.create_server((self._address, 0), family=family) as meeting:
            started = await start_ranks(range(ranks), logs, meeting=meeting)
            port = meeting.getsockname()[1]
        return StartedRanks(started, [Meeting(self._address, port, self._address)] * ranks)


async def start_ranks(
    numbers: Iterable[int],
    logs: Path,
    *,
    at: str = "",
    meeting: socket.socket | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
) -> list[Process]:
    """Ranks of those numbers, on this machine.

    `at` is added to their names. `meeting`: where rank 0 listens for the others.
    """
    started: list[Process] = []
    try:
        for number in numbers:
            listens = number == 0 and meeting is not None
            fds = [meeting.fileno()] if listens and meeting is not None else []
            child = await Child.start(
                "flash.trainer",
                *map(str, fds),
                name=f"trainer rank {number}{at}",
                log_path=logs / f"trainer_rank_{number}.log",
                pass_fds=fds,
                env=env,
                cwd=cwd,
            )
            started.append(child)
    except BaseException:
        await asyncio.shield(end_ranks(started))
        raise
    return started


async def end_ranks(ranks: Iterable[Process]) -> None:
    """At once: a rank keeps nothing that a checkpoint has not."""
    async with asyncio.TaskGroup() as tasks:
        for rank in ranks:
            rank.kill()
            tasks.create_task(rank.stop(), name=f"end {rank.name}")
