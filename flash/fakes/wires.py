"""Connections between a controller and its explorers, which lose, delay, double and mix frames."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from flash.explorer.gate import NotTheController
from flash.explorer.link import LinkLost, Wire


class FakeWires:
    """Connects explorers to whoever `welcome` is now; under virtual time.

    Args:
        welcome: has the controller's end of each connection until it is over; None: nobody is
            there.
        latency_s: of a frame, (least, most).
        rates: the chance of a fault, for each frame: `lose`, `double`, `mix` (with the one before),
            `cut` (the connection), `stall` (nothing passes any more, and nobody is told).
    """

    def __init__(
        self,
        welcome: Callable[[Wire], Awaitable[None]] | None = None,
        *,
        latency_s: tuple[float, float] = (0.001, 0.001),
        rates: Mapping[str, float] | None = None,
        seed: object = 0,
    ) -> None:
        self.welcome = welcome
        self.parted = False  # a partition: no frame passes, and nobody is let in
        self._latency_s = latency_s
        self._rates = rates or {}
        self._rng = random.Random(str(seed))
        self._open: set[FakeWire] = set()

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[Wire]:
        """A wire to the controller; NotTheController if nobody is there."""
        await asyncio.sleep(self._rng.uniform(*self._latency_s))
        if self.welcome is None or self.parted:
            raise NotTheController("nobody is there", again=True)
        here, there = FakeWire(self), FakeWire(self)
        here.other, there.other = there, here
        self._open |= {here, there}
        serving = asyncio.create_task(self._serve(there))
        try:
            yield here
        finally:
            await here.close()
            await asyncio.wait((serving,))

    async def _serve(self, wire: "FakeWire") -> None:
        assert self.welcome is not None
        try:
            await self.welcome(wire)
        finally:
            await wire.close()

    def cut(self) -> None:
        """All connections."""
        for wire in list(self._open):
            wire.cut()

    def forget(self, wire: "FakeWire") -> None:
        self._open.discard(wire)

    def draw(self, fault: str) -> bool:
        rate = self._rates.get(fault, 0.0)
        return bool(rate) and self._rng.random() < rate

    def latency_s(self) -> float:
        return self._rng.uniform(*self._latency_s)


class FakeWire:
    """One end of a connection."""

    other: "FakeWire"

    def __init__(self, wires: FakeWires) -> None:
        self._wires = wires
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._held: bytes | None = None  # to come after the next one
        self._last_at = 0.0
        self._stalled = False
        self._over = False

    async def send(self, frame: bytes) -> None:
        wires = self._wires
        if self._over:
            raise LinkLost("the connection has ended")
        if wires.draw("cut"):
            self.cut()
            return
        self._stalled = self._stalled or wires.draw("stall")
        if self._stalled or wires.parted or wires.draw("lose"):
            return
        frames = [frame, frame] if wires.draw("double") else [frame]
        if self._held is not None:
            frames, self._held = [*frames, self._held], None
        elif wires.draw("mix"):
            self._held = frame
            return
        loop = asyncio.get_running_loop()
        self._last_at = max(self._last_at, loop.time() + wires.latency_s())
        for each in frames:
            loop.call_at(self._last_at, self.other.arrive, each)

    def arrive(self, frame: bytes) -> None:
        if not self._over:
            self._frames.put_nowait(frame)

    async def receive(self) -> bytes:
        frame = await self._frames.get()
        if frame is None:
            raise LinkLost("the connection has ended")
        return frame

    async def close(self) -> None:
        """The other end hears of it after all that was sent."""
        self.end()
        loop = asyncio.get_running_loop()
        loop.call_at(max(self._last_at, loop.time()), self.other.end)

    def cut(self) -> None:
        """Both ends hear of it at once, and what was on its way is lost."""
        self.end()
        self.other.end()

    def end(self) -> None:
        if not self._over:
            self._over = True
            self._frames.put_nowait(None)
            self._wires.forget(self)
