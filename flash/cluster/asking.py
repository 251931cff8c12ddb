"""Explorers that a cluster is asked for: whenever the trainer has all its nodes, and only then.

    TrainersNodes ─► what the trainer lacks
         nothing   explorers are asked for; one without room waits for it
         a node    those that wait are taken back, and those that took its room before its loss
                   was known; those that have played for longer make way if nothing else helps

A cluster gives room to whatever fits into it. An explorer asks for less than the trainer does of a
node, and one that waits would take the room that a lost node of the trainer's comes back with.
"""

import asyncio
from collections import defaultdict
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Protocol

from flash.cluster.place import Place
from flash.errors import ClusterFailure, NodeLost, first_error
from flash.stop import unless

_LOOK_S = 1.0  # between two looks: Ray tells nobody when a placement group has lost a node
_NOTICED_S = 75.0  # Ray knows of a lost node after 15 s; of one that is silent after 65 s
_PATIENCE_S = 10.0  # a node that has room is the trainer's by then
_MAKE_WAY_S = 60.0  # from one node to the next: a lost one may be back by then


@dataclass(frozen=True, slots=True)
class Lack:
    """What the trainer lacks: so many of its nodes.

    `homes`: those that could be one of them by what they have in all, whoever uses that.
    """

    nodes: int = 0
    homes: Set[str] = frozenset()


class TrainersNodes(Protocol):
    """The nodes of a cluster that the trainer has, or will have."""

    @property
    def count(self) -> int: ...

    async def lack(self) -> Lack:
        """At this moment."""
        ...


class AskedExplorer(Protocol):
    """An explorer that a cluster was asked for. NodeLost when its node or process is gone."""

    async def place(self) -> Place:
        """Where it is, as soon as it is on a node: there is no deadline to that."""
        ...

    async def run(self) -> str:
        """Plays until the run is over; why it gave up, if it did."""
        ...

    def end(self) -> None:
        """At once, wherever it is; nothing waits for room any more."""
        ...


@dataclass(frozen=True, slots=True)
class _Playing:
    node: str
    since: float
    makes_way: asyncio.Event = field(default_factory=asyncio.Event)


class AskedExplorers:
    """A run's explorers, each asked for again and again until it gives up or the run is over.

    Args:
        ask: asks the cluster for the explorer of that number.
        count: how many there may be.
        trainer: the nodes of the trainer, which comes first.
        say: is told who gave up, and what is waited for.
    """

    def __init__(
        self,
        ask: Callable[[int], AskedExplorer],
        count: int,
        trainer: TrainersNodes,
        say: Callable[[str], None],
    ) -> None:
        self._ask = ask
        self._count = count
        self._trainer = trainer
        self._say = say
        self._gave_up = 0
        self._keeping: dict[int, asyncio.Task[None]] = {}
        self._playing: dict[int, _Playing] = {}
        self._whole, self._lacking = asyncio.Event(), asyncio.Event()
        self._lacks_since: float | None = None
        self._made_way_at = 0.0
        self._told = False

    async def play(self) -> None:
        """Returns when all have heard that the run is over; ClusterFailure once all gave up."""
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(self._watch(), name="the trainer's nodes")
                for number in range(self._count):
                    self._keeping[number] = tasks.create_task(
                        self._keep(number), name=f"explorer-{number}"
                    )
                await asyncio.wait(self._keeping.values())
                watching.cancel()

    def ask_no_more(self) -> None:
        """The run is over: those that play hear of it by themselves."""
        for number in self._keeping.keys() - self._playing.keys():
            self._keeping[number].cancel()

    async def _keep(self, number: int) -> None:
        why = await self._play_once(number)
        while why is None:
            await asyncio.sleep(_LOOK_S)  # what ended it may end the next one as soon
            why = await self._play_once(number)
        if why:
            self._say(why)
            self._gave_up += 1
            if self._gave_up == self._count:
                raise ClusterFailure(f"no explorer is left: {why}; its lines above tell the cause")

    async def _play_once(self, number: int) -> str | None:
        """Why it gave up, "" if the run is over; None if it is to be asked for again."""
        await self._whole.wait()
        explorer = self._ask(number)
        try:
            place = await unless(self._lacking, explorer.place())
            if place is None:
                return None
            playing = _Playing(place.node, asyncio.get_running_loop().time())
            self._playing[number] = playing
            return await unless(playing.makes_way, explorer.run())
        except NodeLost:
            return None
        finally:
            self._playing.pop(number, None)
            explorer.end()

    async def _watch(self) -> None:
        while True:
            lack = await self._trainer.lack()
            if lack.nodes:
                self._whole.clear()
                self._lacking.set()
                self._help(lack, asyncio.get_running_loop().time())
            else:
                self._lacks_since = None
                self._lacking.clear()
                self._whole.set()
                if self._told:
                    self._told = False
                    self._say("the trainer has all its nodes: explorers are asked for again")
            await asyncio.sleep(_LOOK_S)

    def _help(self, lack: Lack, now: float) -> None:
        if self._lacks_since is None:
            self._lacks_since = self._made_way_at = now
        for playing in self._playing.values():
            if playing.node in lack.homes and playing.since > self._lacks_since - _NOTICED_S:
                playing.makes_way.set()
        if now - self._lacks_since >= _PATIENCE_S and not self._told:
            self._tell(lack)
        if now - self._made_way_at >= _MAKE_WAY_S:
            self._made_way_at = now
            self._make_way(lack)

    def _tell(self, lack: Lack) -> None:
        self._told = True
        self._say(
            f"explorers wait for the trainer, which lacks {lack.nodes} of {self._trainer.count} "
            f"nodes: Ray has none with room (cluster.trainer); {len(self._playing)} of "
            f"{self._count} play on"
        )

    def _make_way(self, lack: Lack) -> None:
        """On the node where it costs the fewest, unless nobody would be left to learn from."""
        on: dict[str, list[int]] = defaultdict(list)
        for number, playing in self._playing.items():
            if playing.node in lack.homes:
                on[playing.node].append(number)
        node = min(on, key=lambda name: len(on[name]), default="")
        if not node or len(on[node]) == len(self._playing):
            return
        for number in on[node]:
            self._playing[number].makes_way.set()
        names = ", ".join(f"explorer-{number}" for number in sorted(on[node]))
        self._say(
            f"{names} on node {node} {'makes' if len(on[node]) == 1 else 'make'} way for the "
            f"trainer, which lacks {lack.nodes} of {self._trainer.count} nodes"
        )
