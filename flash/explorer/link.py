"""One connection between a controller and an explorer: messages gathered into numbered frames.

    send ─► gathered for some ms ─► frame n ─► wire ─► n is next? its messages
                                                       n was here: nothing
                                                       n is further: the link is lost

An empty frame is sent where there is nothing to say, and a link on which nothing was heard for its
deadline is lost. What is lost with a link is found out by the Hello and Welcome of the next one.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any, Generic, Protocol, Self, TypeVar

import msgspec

from flash.errors import one_line
from flash.explorer.messages import UNREADABLE, decoder, encoder

_GATHERS_S = 0.004
_MAY_WAIT_S = 0.05  # what nobody waits for: frames of their own would cost more than what they say
_LAST_WORDS_S = 2.0
_CLOSES_S = 5.0  # until the other side has said that it closes as well
_BEATS = 4  # in a deadline
_MOST_PENDING = 1 << 16  # messages: who takes none of them is gone

T = TypeVar("T")


class LinkLost(Exception):
    """The connection has ended; says why."""


class Wire(Protocol):
    """What carries frames: in order, or the link is lost. Raises LinkLost at its end.

    `local_address`: that of this machine at which the other side has reached it, or reached out.
    """

    @property
    def local_address(self) -> str: ...

    async def send(self, frame: bytes) -> None: ...

    async def receive(self) -> bytes: ...

    async def close(self) -> None: ...


class _Frame(msgspec.Struct, Generic[T], frozen=True, array_like=True):
    number: int
    messages: list[T]


class Link(Generic[T]):
    """Sends messages, and gives those that come, of the kind `receives`.

    To be entered; leaving it sends what is gathered, if that can be, and closes the wire.

    Args:
        deadline_s: for hearing anything.
        before_frame: called before each frame is made, to add to it.
    """

    def __init__(
        self,
        wire: Wire,
        receives: Any,
        *,
        deadline_s: float,
        before_frame: Callable[[], None] = lambda: None,
    ) -> None:
        self._wire = wire
        self._decode = decoder(_Frame[receives]).decode
        self._deadline_s = deadline_s
        self.before_frame = before_frame
        self._clock = asyncio.get_running_loop().time
        self._heard_at = self._clock()
        self._pending: list[Any] = []
        self._wake = asyncio.Event()
        self._wakes_later: asyncio.TimerHandle | None = None
        self._numbers = itertools.count(1)
        self._last = 0
        self._lost: LinkLost | None = None
        self._receiving: asyncio.Timeout | None = None

    async def __aenter__(self) -> Self:
        self._writing = asyncio.create_task(self._write(), name="link")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        closes_s = _CLOSES_S if self._lost is None else 0.0  # nobody is there to say anything
        if self._lost is None and self._pending:
            with contextlib.suppress(LinkLost, TimeoutError):
                async with asyncio.timeout(_LAST_WORDS_S):
                    await self._send_pending()
        self._lose("closed")
        self._writing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._writing
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(closes_s):
                await self._wire.close()

    @property
    def heard_at(self) -> float:
        """When anything was heard last, by the event loop's clock."""
        return self._heard_at

    def send(self, message: Any, *, soon: bool = True) -> None:
        """With the next frame, which is made soon, or may wait for more to say; on a link that is
        lost nothing comes of it."""
        if self._lost is not None:
            return
        self._pending.append(message)
        if len(self._pending) > _MOST_PENDING:
            self._lose(f"{_MOST_PENDING} messages wait for the other side to read")
        self.poke(soon=soon)

    def use_deadline(self, deadline_s: float) -> None:
        """From now on."""
        self._deadline_s = deadline_s
        self.poke()

    def poke(self, *, soon: bool = True) -> None:
        """Makes a frame, for what `before_frame` adds to it."""
        if soon:
            self._wake.set()
        elif self._wakes_later is None:
            loop = asyncio.get_running_loop()
            self._wakes_later = loop.call_later(_MAY_WAIT_S, self._wake.set)

    async def flush(self) -> None:
        """Sends what is gathered."""
        with contextlib.suppress(LinkLost):
            await self._send_pending()

    async def messages(self) -> AsyncIterator[T]:
        """As they come; LinkLost when no more will."""
        while True:
            frame = await self._next_frame()
            if frame.number <= self._last:
                continue
            if frame.number > self._last + 1:
                raise self._lose(f"frame {self._last + 1} is missing")
            self._last = frame.number
            for message in frame.messages:
                yield message

    async def _next_frame(self) -> _Frame[T]:
        if self._lost is not None:
            raise self._lost
        try:
            async with asyncio.timeout(None) as self._receiving:  # which a loss ends
                data = await self._wire.receive()
        except TimeoutError:
            assert self._lost is not None
            raise self._lost from None
        finally:
            self._receiving = None
        self._heard_at = self._clock()
        try:
            frame: _Frame[T] = self._decode(data)
        except UNREADABLE as error:
            raise self._lose(f"a message that is none: {error}") from error
        return frame

    async def _write(self) -> None:
        try:
            while self._lost is None:
                beat_s = self._deadline_s / _BEATS
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(beat_s):
                        await self._wake.wait()
                        await asyncio.sleep(_GATHERS_S)
                self._wake.clear()
                if self._is_overdue():
                    # A loop that was held up has timers that are due, and what came meanwhile.
                    await asyncio.sleep(_GATHERS_S)
                if self._is_overdue():
                    self._lose(f"nothing was heard for {self._clock() - self._heard_at:.0f} s")
                    return
                await self._send_pending()
        except Exception as error:  # whoever reads must hear that nothing is sent any more
            self._lose(str(error) if isinstance(error, LinkLost) else one_line(error))

    def _is_overdue(self) -> bool:
        return self._clock() - self._heard_at >= self._deadline_s

    async def _send_pending(self) -> None:
        if self._wakes_later is not None:
            self._wakes_later.cancel()
            self._wakes_later = None
        self.before_frame()
        messages, self._pending = self._pending, []
        frame = _Frame(next(self._numbers), messages)
        try:
            async with asyncio.timeout(self._deadline_s):
                await self._wire.send(encoder.encode(frame))
        except TimeoutError:
            raise self._lose(f"nothing was taken for {self._deadline_s:.0f} s") from None

    def _lose(self, why: str) -> LinkLost:
        """The first reason is the one that counts."""
        if self._lost is None:
            self._lost = LinkLost(why)
            if self._receiving is not None:
                self._receiving.reschedule(self._clock())
        return self._lost
