"""A trainer's ranks on several nodes of a cluster: here the first of them, roles have the others.

    Trainer ─► RanksOnNodes ─► ranks 0, 1, … on the controller's node
                    └────────► RanksRole × further nodes ─► ranks of that node, which follow

Each start has a name, by which a role knows whose ranks it has: those of an earlier start, of a
controller that was lost perhaps, are ended, and whoever still calls them is told so.
"""

import asyncio
import logging
import uuid
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Protocol

from flash.cluster.far import FarProcess, HasProcesses, Processes
from flash.cluster.place import Place
from flash.cluster.roles import Plan, working_directory
from flash.errors import first_error
from flash.trainer.ranks import Meeting, RankStarter, StartedRanks, end_ranks, start_ranks

logger = logging.getLogger(__name__)

_PATIENCE_S = 10.0  # a node that is there has started its ranks by then, or nearly so


class Controller(Protocol):
    """What a role of ranks tells the controller's role."""

    def register(self, place: Place) -> Awaitable[None]: ...


class RanksNode(Processes, Protocol):
    """What has ranks on a further node, or will have them: `RanksRole`, wherever that is."""

    async def start(self, name: str, ranks: Sequence[int], logs: str) -> Place:
        """Ends the ranks that it has and starts these, as soon as it is on a node: there is no
        deadline to that. ValueError for a node that lacks what the run needs."""
        ...


class RanksRole(HasProcesses):
    """Has the ranks of a node; its methods are called from elsewhere in the cluster."""

    def __init__(self, plan: Plan, place: Place, controller: Controller) -> None:
        super().__init__(place.role, "trainer rank")
        self._plan = plan
        self._place = place
        self._controller = controller
        self._starting = asyncio.Lock()

    async def start(self, name: str, ranks: Sequence[int], logs: str) -> Place:
        if not Path(self._plan.marker).exists():
            raise ValueError(
                f"runs_dir={self._plan.settings['runs_dir']!r} is not shared with the node at "
                f"{self._place.address}, on which {self.name} was started: name a folder that all "
                f"nodes share"
            )
        async with self._starting:
            left, self._start, self._processes = self._processes, name, {}
            await end_ranks(left.values())
            started = await start_ranks(
                ranks,
                Path(logs),
                at=_at(self._place),
                env=None if self._place.gpus else {"CUDA_VISIBLE_DEVICES": ""},
                cwd=working_directory(self._plan),
            )
            self._processes = dict(zip(ranks, started, strict=True))
        await self._controller.register(self._place)
        return self._place


class RanksOnNodes:
    """A RankStarter: as many ranks on each node, first those on this one.

    Args:
        here: of this node's ranks, whose address must be one that others reach.
        others: what has the ranks of further nodes.
    """

    def __init__(self, here: RankStarter, others: Sequence[RanksNode]) -> None:
        self._here = here
        self._others = others
        self._awaited: set[str] = set()

    @property
    def nodes(self) -> int:
        return 1 + len(self._others)

    @property
    def waits_for(self) -> str:
        return f"a node for {', '.join(sorted(self._awaited))}" if self._awaited else ""

    async def start(self, ranks: int, logs: Path) -> StartedRanks:
        each = ranks // self.nodes
        name = uuid.uuid4().hex
        of_others = [range(n * each, (n + 1) * each) for n in range(1, self.nodes)]
        places = await self._start_others(name, of_others, logs)
        here = await self._here.start(each, logs)
        started, meetings = [*here.ranks], [*here.meetings]
        for node, place, numbers in zip(self._others, places, of_others, strict=True):
            started += [
                FarProcess(f"trainer rank {number}{_at(place)}", node, name, number)
                for number in numbers
            ]
            meetings += [Meeting(meetings[0].host, meetings[0].port, place.address)] * each
        return StartedRanks(started, meetings)

    async def _start_others(
        self, name: str, ranks: Sequence[Sequence[int]], logs: Path
    ) -> list[Place]:
        async def start(node: RanksNode, numbers: Sequence[int]) -> Place:
            place = await node.start(name, numbers, str(logs))
            self._awaited.discard(node.name)
            return place

        self._awaited = {node.name for node in self._others}
        try:
            with first_error():
                async with asyncio.TaskGroup() as tasks:
                    telling = tasks.create_task(self._tell_of_waiting(), name="what is awaited")
                    starting = [
                        tasks.create_task(start(node, numbers), name=f"ranks of {node.name}")
                        for node, numbers in zip(self._others, ranks, strict=True)
                    ]
                    await asyncio.wait(starting)
                    telling.cancel()
        finally:
            self._awaited = set()
        return [task.result() for task in starting]

    async def _tell_of_waiting(self) -> None:
        await asyncio.sleep(_PATIENCE_S)
        logger.warning(
            "the trainer waits for %s, however long: Ray has none with room for it "
            "(cluster.trainer)",
            self.waits_for,
        )


def _at(place: Place) -> str:
    return f" at {place.address}"
