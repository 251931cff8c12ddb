"""An explorer's environment hosts and reward processes on whichever nodes have cores for them.

    EnvHosts, RewardProcesses ─► FarHosts ─► HostRole × processes, each with cores of a node

A role has the processes of one log file after another: those in the place of one that hung, and the
held-out environments' beside the training ones', which wait for each other.
"""

import asyncio
import itertools
import random
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from flash.cluster.far import FarProcess, HasProcesses, Processes
from flash.cluster.place import Place
from flash.cluster.roles import folder_of_node
from flash.errors import ClusterFailure, NodeLost, first_error
from flash.system.process import Answers, Child

_T = TypeVar("_T")

_PATIENCE_S = 10.0  # a node that has room has what is asked by then
_ROOM_S = 310.0  # longer than an explorer's role takes for a start that fails at once
_JITTER = 1.3  # of explorers that each have a part of what they need, one gives up first


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A process that a role is to start, as `StartProcess` is told."""

    module: str
    name: str
    log_path: str
    answers: Answers | None
    cwd: str


class HostNode(Processes, Protocol):
    """What has a process on some node, or will have it: `HostRole`, wherever that is."""

    async def place(self) -> Place:
        """Where it is, as soon as it is on a node: there is no deadline to that."""
        ...

    async def start(self, name: str, number: int, wanted: Wanted) -> tuple[Place, str]:
        """Starts it as soon as this is on a node: where that is, and below which folder its log is
        if that node does not see the one that was asked for."""
        ...

    def end(self) -> None:
        """At once, with all that it has."""
        ...


class HostRole(HasProcesses):
    """Has a process of an explorer's; its methods are called from elsewhere in the cluster."""

    def __init__(self, place: Place) -> None:
        super().__init__(place.role, "process")
        self._place = place

    async def place(self) -> Place:
        return self._place

    async def start(self, name: str, number: int, wanted: Wanted) -> tuple[Place, str]:
        log, logs = Path(wanted.log_path), ""
        if not log.exists():  # the explorer has made it on its own disk
            folder = folder_of_node("hosts", str(log.parent))
            log, logs = folder / log.name, str(folder.parent)
        self._start = name
        self._processes[number] = await Child.start(
            wanted.module,
            name=f"{wanted.name} at {self._place.address}",
            log_path=log,
            env={"CUDA_VISIBLE_DEVICES": ""},
            answers=wanted.answers,
            cwd=wanted.cwd if Path(wanted.cwd).is_dir() else None,
        )
        return self._place, logs


class FarHosts:
    """A StartProcess on other nodes. Entering waits until each of `count` has its cores.

    Args:
        new: makes what has a process, of that name.
        of: the explorer that they are of.
        count: of the environment hosts and reward processes that it will have.
        cpus: what each asks for (`cluster.hosts.cpus`).
        say: is told where they are, and what they wait for.

    Raises ClusterFailure if there is no room for minutes.
    """

    def __init__(
        self,
        new: Callable[[str], HostNode],
        *,
        of: str,
        count: int,
        cpus: int,
        say: Callable[[str], None] = print,
    ) -> None:
        self._new = new
        self._of = of
        self._count = count
        self._cpus = cpus
        self._say = say
        self._start = uuid.uuid4().hex
        self._numbers = itertools.count()
        self._spare: list[HostNode] = []
        self._nodes: dict[Path, HostNode] = {}  # by the log of what they have
        self._places: dict[str, Place] = {}
        self._logs: dict[str, str] = {}  # where they are, by the node that has its own
        self._told = ""

    async def __aenter__(self) -> "FarHosts":
        self._spare = [self._new(f"{self._of}-host-{number}") for number in range(self._count)]
        try:
            with first_error():
                async with asyncio.TaskGroup() as tasks:
                    telling = tasks.create_task(self._tell_of_waiting(), name="what is awaited")
                    one = f"one of {self._count} environment hosts and reward processes"
                    await self._with_room(self._place_all(), one)
                    telling.cancel()
        except NodeLost as lost:
            self._end()
            raise ClusterFailure(str(lost)) from None
        except BaseException:
            self._end()
            raise
        self._tell()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._end()

    async def __call__(
        self, module: str, *, name: str, log_path: Path, answers: Answers | None = None
    ) -> FarProcess:
        """NodeLost if no node has room for it for minutes."""
        node = self._nodes.get(log_path)
        if node is None:
            node = self._spare.pop(0) if self._spare else self._new(f"{self._of}-{log_path.stem}")
            self._nodes[log_path] = node
        log_path.parent.mkdir(parents=True, exist_ok=True)
        log_path.touch()  # where it is seen, it is written to
        number = next(self._numbers)
        wanted = Wanted(
            module=module,
            name=name,
            log_path=str(log_path.absolute()),
            answers=answers,
            cwd=str(Path.cwd()),
        )
        place, logs = await self._with_room(node.start(self._start, number, wanted), name)
        self._places[node.name] = place
        if logs:
            self._logs[place.node] = logs
        self._tell()
        return FarProcess(f"{name} at {place.address}", node, self._start, number)

    async def _place_all(self) -> None:
        async def place(node: HostNode) -> None:
            self._places[node.name] = await node.place()

        with first_error():
            async with asyncio.TaskGroup() as tasks:
                for node in self._spare:
                    tasks.create_task(place(node), name=f"place {node.name}")

    async def _with_room(self, there: Awaitable[_T], name: str) -> _T:
        limit_s = _ROOM_S * random.uniform(1.0, _JITTER)
        try:
            async with asyncio.timeout(limit_s):
                return await there
        except TimeoutError:
            raise NodeLost(
                f"{name} has no node after {limit_s:.0f} s: none has room for "
                f"cluster.hosts.cpus={self._cpus}: ask for less, or add a node"
            ) from None

    async def _tell_of_waiting(self) -> None:
        await asyncio.sleep(_PATIENCE_S)
        missing = self._count - len(self._places)
        self._say(
            f"{self._of} waits for a node for {missing} of its {self._count} environment hosts and "
            f"reward processes: Ray has none with room (cluster.hosts.cpus={self._cpus})"
        )

    def _tell(self) -> None:
        """Where they are, if that is new."""
        on = Counter((place.node, place.address) for place in self._places.values())
        each = []
        for (node, address), count in on.items():
            logs = f", logs there in {self._logs[node]}" if node in self._logs else ""
            each.append(f"{count} on node {node} ({address}){logs}")
        told = f"{self._of}: environment hosts and reward processes: {'; '.join(each)}"
        if told != self._told:
            self._told = told
            self._say(told)

    def _end(self) -> None:
        for node in (*self._spare, *self._nodes.values()):
            node.end()
