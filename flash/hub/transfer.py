"""Weights that a sender sends to the ranks of one server, in a group of these alone.

    trainer ranks ─► export (host memory) ─► sender ══ NCCL ══► ranks of the server
                                               ▲                     ▲
                                               └────── client ───────┘ HTTP: what comes next

Each server has a sender of its own, a process on a GPU of the trainer's, and the two form a
group; for an explorer's server it is the controller's process. What they send is the export that
was published, so a server that returns late gets the same weights as the others had, whatever the
trainer does meanwhile. NCCL waits for ever for a peer that is gone: when a transfer fails or takes
too long the sender is killed, and its group with it. That costs neither the trainer nor another
server anything.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any, Protocol

from flash.errors import ProcessFailure, first_error
from flash.hub.sender import ChunkInfo, SenderProcess, StartSender
from flash.hub.worker import WeightsGone, WorkerBroken, WorkerFailure
from flash.types import Weights

CHUNK_BYTES = 1 << 28
_ANSWER_TIMEOUT_S = 5.0
_NO_VERSION = -1


class Receiver(Protocol):
    """What is asked of the client of a server that is sent to."""

    name: str

    async def join(self, sender: SenderProcess) -> None:
        """Forms a group of the sender, its rank 0, and the ranks of the server."""
        ...

    async def told_version(self) -> str:
        """The version that the server was told last; who tells it asks none of its ranks."""
        ...

    async def set_version(self, version: int) -> None: ...


class Transfer:
    """A server's sender, and whether the server has had an update that broke off.

    Args:
        start_sender: starts the process that sends; it is used until a transfer fails.
        chunk_bytes: of one broadcast, and of GPU memory at both ends while it lasts.

    A server in which an update broke off is not well until it has been started anew: its weights
    are neither the old nor the new ones, and its ranks may wait for the sender for ever.
    """

    def __init__(
        self, receiver: Receiver, start_sender: StartSender, *, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        self._receiver = receiver
        self._start_sender = start_sender
        self.chunk_bytes = chunk_bytes
        self._sender: SenderProcess | None = None
        self._joined = False
        self._spoiled = False
        self._told_version = ""

    async def told(self, version: int) -> None:
        """The server was told that version."""
        self._told_version = str(version)
        if self._sender is None:
            # Not needed before the next publish, by when it has done its imports: many seconds.
            self._sender = await self._start_sender()

    async def check(self) -> None:
        """WorkerBroken if an update broke off, and it was not started anew since."""
        if self._spoiled:
            if not await self._was_restarted():
                raise WorkerBroken(f"{self._receiver.name}: an update of its weights broke off")
            self._spoiled = False

    @contextlib.asynccontextmanager
    async def begun(self) -> AsyncIterator[bool]:
        """An update, in the block; whether it is the first of this server's process.

        After one that fails the sender is gone, and the server broken if it broke off.
        """
        try:
            is_first = not self._told_version or await self._was_restarted()
            if is_first:
                if self._joined:
                    await self.end()
                # A mark: its successor will not know it.
                await self._receiver.set_version(_NO_VERSION)
            yield is_first
        except WeightsGone:
            raise
        except ProcessFailure as failure:
            await self.end()
            kind = WorkerBroken if self._spoiled else WorkerFailure
            raise kind(f"{self._receiver.name} can't be sent its weights: {failure}") from failure
        except WorkerFailure as failure:
            await self.end()
            if self._spoiled:
                raise WorkerBroken(str(failure)) from failure
            raise
        except BaseException:
            await self.end()
            raise

    async def ready(
        self, weights: Weights, *, delta: bool = False
    ) -> tuple[SenderProcess, list[ChunkInfo]]:
        """A sender that has the weights or their delta, in a group with the server.

        WeightsGone if they are not to be had any more.
        """
        chunks = None
        if self._sender is not None:
            try:
                chunks = await self._sender.open(weights, self.chunk_bytes, delta=delta)
            except ProcessFailure:  # it ended since the last time
                await self.end()
        if self._sender is None:
            self._sender = await self._start_sender()
            chunks = await self._sender.open(weights, self.chunk_bytes, delta=delta)
        if chunks is None:
            raise WeightsGone(
                f"{self._receiver.name}: there are newer weights than {weights.version}"
            )
        if not self._joined:
            await self._receiver.join(self._sender)
            self._joined = True
        return self._sender, chunks

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """The server's weights, in the block: if that is left early, they are spoiled."""
        self._spoiled = True
        yield
        self._spoiled = False

    async def end(self) -> None:
        """There is no sender from now on until the next is needed."""
        sender, self._sender, self._joined = self._sender, None, False
        if sender is not None:
            sender.kill()
            await sender.stop()

    async def _was_restarted(self) -> bool:
        """Whether it is another process than the one that was told its version last."""
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                return await self._receiver.told_version() != self._told_version
        except TimeoutError:
            return False  # its ranks hang


async def both(*calls: Coroutine[Any, Any, Any]) -> None:
    """Waits for all; the first that fails ends the others."""
    with first_error():
        async with asyncio.TaskGroup() as tasks:
            for call in calls:
                tasks.create_task(call)
