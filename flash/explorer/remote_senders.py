"""An explorer's side of senders that run at its controller: what clients ask, as messages."""

import asyncio
import functools
import itertools

from flash.errors import ProcessFailure
from flash.explorer.link import Link
from flash.explorer.messages import (
    EndSender,
    FromController,
    JoinGroup,
    NewGroup,
    OpenWeights,
    SendChunk,
    SenderAnswer,
    SenderCall,
    StartSender,
)
from flash.hub.sender import ChunkInfo
from flash.hub.sender import StartSender as Start
from flash.types import Weights

Call = NewGroup | JoinGroup | OpenWeights | SendChunk
Answer = asyncio.Future[bytes | list[ChunkInfo] | None]


class RemoteSenders:
    """Senders by whichever link there is; those of a link that is lost are lost with it."""

    def __init__(self) -> None:
        self._link: Link[FromController] | None = None
        self._linked = asyncio.Event()
        self._senders: set[RemoteSender] = set()
        self._numbers = itertools.count()
        self._calls: dict[int, Answer] = {}

    def of(self, worker: int) -> Start:
        """Starts senders to that worker."""
        return functools.partial(self._start, worker)

    async def _start(self, worker: int) -> "RemoteSender":
        sender = RemoteSender(self, worker, next(self._numbers))
        self._senders.add(sender)
        if self._link is not None:
            sender.begin(self._link)
        return sender

    # ── the link ─────────────────────────────────────────────────────────────────────────────

    def attach(self, link: Link[FromController]) -> None:
        """A controller that knows of no sender."""
        self._link = link
        self._linked.set()

    def detach(self) -> None:
        """The link is lost."""
        self._link = None
        self._linked.clear()
        for sender in list(self._senders):
            sender.lose()

    def hear(self, message: SenderAnswer) -> None:
        answer = self._calls.get(message.number)
        if answer is None or answer.done():
            return  # nobody waits for it any more
        if message.failure:
            answer.set_exception(ProcessFailure(message.failure))
        else:
            answer.set_result(message.value)

    # ── what its senders need ────────────────────────────────────────────────────────────────

    async def link(self) -> Link[FromController]:
        """As soon as there is one."""
        while self._link is None:
            await self._linked.wait()
        return self._link

    def ask(self, link: Link[FromController], sender: int, call: Call) -> Answer:
        number = next(self._numbers)
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: self._calls.pop(number))
        link.send(SenderCall(sender, number, call))
        return answer

    def forget(self, sender: "RemoteSender") -> None:
        self._senders.discard(sender)


class RemoteSender:
    """One of them. Before it has begun it waits for a link."""

    def __init__(self, senders: RemoteSenders, worker: int, number: int) -> None:
        self._senders = senders
        self._worker = worker
        self._number = number
        self._link: Link[FromController] | None = None
        self._waiting: set[Answer] = set()
        self._lost = False

    def begin(self, link: Link[FromController]) -> None:
        self._link = link
        link.send(StartSender(self._number, self._worker))

    def lose(self) -> None:
        """What it was at has failed, and so does whatever it is asked."""
        if self._link is None:
            return
        self._lost = True
        self._senders.forget(self)
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(_loss())

    async def new_id(self) -> bytes:
        group_id = await self._ask(NewGroup())
        if not isinstance(group_id, bytes):
            raise ProcessFailure("the controller's sender has made no group")
        return group_id

    async def join(self, size: int) -> None:
        await self._ask(JoinGroup(size))

    async def open(
        self, weights: Weights, chunk_bytes: int, *, delta: bool
    ) -> list[ChunkInfo] | None:
        chunks = await self._ask(OpenWeights(weights.version, chunk_bytes, delta))
        if isinstance(chunks, bytes):
            raise ProcessFailure("the controller's sender tells of no chunks")
        return chunks

    async def send(self, number: int) -> None:
        await self._ask(SendChunk(number))

    def kill(self) -> None:
        if self._link is not None and not self._lost:
            self._link.send(EndSender(self._number))
        self._lost = True
        self._senders.forget(self)

    async def stop(self) -> None:
        """Its process is the controller's to wait for."""

    async def _ask(self, call: Call) -> bytes | list[ChunkInfo] | None:
        if self._link is None:
            link = await self._senders.link()
            if self._link is None:
                self.begin(link)
        if self._lost:
            raise _loss()
        assert self._link is not None
        answer = self._senders.ask(self._link, self._number, call)
        self._waiting.add(answer)
        try:
            return await answer
        finally:
            self._waiting.discard(answer)


def _loss() -> ProcessFailure:
    return ProcessFailure("the connection to the controller was lost, and its sender with it")
