"""The controller's side of sending weights to explorers' workers: processes on the trainer's GPUs.

    explorer: its client ─► remote_senders.py ══ link ══► Senders ─► a sender's process
                   └─ HTTP ─► its server ◄═══════════════ NCCL ═══════════┘

They end with the link by which they were asked for: what was under way then is of no use.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self

from flash.errors import FlashError, ProcessFailure
from flash.explorer.link import Link
from flash.explorer.messages import (
    EndSender,
    FromExplorer,
    JoinGroup,
    NewGroup,
    OfSender,
    OpenWeights,
    SendChunk,
    SenderAnswer,
    SenderCall,
    StartSender,
)
from flash.hub.sender import ChunkInfo, SenderProcess
from flash.types import Weights

logger = logging.getLogger(__name__)

_MOST = 64  # of an explorer: each takes memory of a GPU of the trainer's


@dataclass(frozen=True, slots=True, kw_only=True)
class Sending:
    """What the senders of a run are, and what they send.

    `start`: for an explorer's worker, by its number; to be reached at an address of this machine.
    `weights`: those of a version, if they are to be had still.
    """

    start: Callable[[str, int, str], Awaitable[SenderProcess]]
    weights: Callable[[int], Awaitable[Weights | None]]


class Senders:
    """Those of one explorer, while the block runs, which is as long as a link of its lasts.

    Args:
        sending: None if the run's weights are not sent so.
        link: by which they are asked, and answer.
        explorer: its name.
        address: of this machine, at which the explorer has reached it.
    """

    def __init__(
        self,
        sending: Sending | None,
        link: Link[FromExplorer],
        *,
        explorer: str,
        address: str,
    ) -> None:
        self._sending = sending
        self._link = link
        self._tasks = asyncio.TaskGroup()
        self._explorer = explorer
        self._address = address
        self._starts: dict[int, asyncio.Task[SenderProcess | str]] = {}

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for sender in list(self._starts):
            self._end(sender)
        await self._tasks.__aexit__(None, None, None)

    def hear(self, message: OfSender) -> None:
        match message:
            case StartSender():
                if message.sender not in self._starts:
                    self._starts[message.sender] = self._tasks.create_task(
                        self._start(message.worker, too_many=len(self._starts) >= _MOST),
                        name=f"sender to {self._explorer}",
                    )
            case SenderCall():
                self._tasks.create_task(self._answer(message), name=f"send to {self._explorer}")
            case EndSender():
                self._end(message.sender)

    def _end(self, sender: int) -> None:
        """Whatever it is at; what was asked of it fails then."""
        if (start := self._starts.pop(sender, None)) is not None:
            start.add_done_callback(_kill)

    async def _start(self, worker: int, *, too_many: bool) -> SenderProcess | str:
        """The process, or why there is none."""
        if self._sending is None:
            return "this run's weights are not sent over NCCL: its engine.transport is disk"
        if too_many:
            return f"an explorer may have {_MOST} senders at a time"
        try:
            return await self._sending.start(self._explorer, worker, self._address)
        except (OSError, FlashError) as error:
            logger.warning("no sender to worker %d of %s: %s", worker, self._explorer, error)
            return f"the controller could not start it: {error}"

    async def _answer(self, asked: SenderCall) -> None:
        try:
            answer = SenderAnswer(asked.number, await self._do(asked))
        except ProcessFailure as failure:
            answer = SenderAnswer(asked.number, failure=str(failure))
        self._link.send(answer)

    async def _do(self, asked: SenderCall) -> bytes | list[ChunkInfo] | None:
        start = self._starts.get(asked.sender)
        sender = "it has ended" if start is None else await asyncio.shield(start)
        if isinstance(sender, str):
            raise ProcessFailure(f"there is no sender: {sender}")
        match asked.call:
            case NewGroup():
                return await sender.new_id()
            case JoinGroup(size):
                await sender.join(size)
            case OpenWeights(version, chunk_bytes, delta):
                assert self._sending is not None
                if (weights := await self._sending.weights(version)) is not None:
                    return await sender.open(weights, chunk_bytes, delta=delta)
            case SendChunk(chunk):
                await sender.send(chunk)
        return None


def _kill(start: asyncio.Task[SenderProcess | str]) -> None:
    if start.cancelled() or start.exception() is not None:
        return  # there is none
    if not isinstance(sender := start.result(), str):
        sender.kill()
