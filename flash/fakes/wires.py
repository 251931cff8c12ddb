"""Connections between a controller and its explorers, which lose, delay, double and mix frames."""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

from flash.explorer.gate import NotTheController
from flash.explorer.link import LinkLost, Wire

_MOMENT_S = 1e-6


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
        self.parted_from: set[str] = set()  # likewise, of those whose name it is
        self._latency_s = latency_s
        self.rates = dict(rates or {})
        self._rng = random.Random(str(seed))
        self._open: dict[FakeWire, None] = {}
        self._serving: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def connect(self, name: str = "") -> AsyncIterator[Wire]:
        """A wire to the controller, for who is called so; NotTheController if nobody is there."""
        await asyncio.sleep(self._rng.uniform(*self._latency_s))
        if self.welcome is None or self.is_parted(name):
            raise NotTheController("nobody is there", again=True)
        here, there = FakeWire(self, name, explorers=True), FakeWire(self, name)
        there.welcome = self.welcome
        here.other, there.other = there, here
        self._open |= {here: None, there: None}
        serving = asyncio.create_task(self._serve(self.welcome, there), name="wire")
        self._serving.add(serving)
        serving.add_done_callback(self._serving.discard)
        try:
            yield here
        finally:
            await here.close()

    async def _serve(self, welcome: Callable[[Wire], Awaitable[None]], wire: "FakeWire") -> None:
        try:
            await welcome(wire)
        except Exception as error:  # as a server: it tells of it, and serves others
            about = {"message": "an explorer's welcome", "exception": error}
            asyncio.get_running_loop().call_exception_handler(about)
        finally:
            await wire.close()

    def cut(self, name: str | None = None) -> None:
        """All connections, or those of one."""
        for wire in list(self._open):
            if wire.explorers and name in (None, wire.explorer):
                wire.cut()

    def end(self, welcome: Callable[[Wire], Awaitable[None]]) -> None:
        """The controller whose `welcome` that is does not listen any more."""
        if self.welcome == welcome:
            self.welcome = None
        for wire in list(self._open):
            if wire.welcome == welcome:
                wire.cut()

    def stall(self, *, of_explorers: bool = False) -> None:
        """On the connections that there are nothing passes any more, or nothing of what explorers
        send; and nobody is told."""
        for wire in self._open:
            wire.stalled = wire.explorers or not of_explorers

    def vanish(self, name: str) -> None:
        """Nothing comes from that one any more, and nobody is told: its machine is gone."""
        for wire in list(self._open):
            if wire.explorers and wire.explorer == name:
                wire.end()

    def is_parted(self, name: str) -> bool:
        return self.parted or name in self.parted_from

    def forget(self, wire: "FakeWire") -> None:
        self._open.pop(wire, None)

    def draw(self, fault: str) -> bool:
        rate = self.rates.get(fault, 0.0)
        return bool(rate) and self._rng.random() < rate

    def latency_s(self) -> float:
        return self._rng.uniform(*self._latency_s)


class FakeWire:
    """One end of a connection."""

    local_address = "127.0.0.1"
    other: "FakeWire"

    def __init__(self, wires: FakeWires, explorer: str, *, explorers: bool = False) -> None:
        self.explorer = explorer
        self.explorers = explorers  # its end
        self.welcome: Callable[[Wire], Awaitable[None]] | None = None  # of whom it is the end
        self._wires = wires
        self._frames: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._held: bytes | None = None  # to come after the next one
        self._last_at = 0.0
        self.stalled = False
        self._over = False

    async def send(self, frame: bytes) -> None:
        wires = self._wires
        if self._over:
            raise LinkLost("the connection has ended")
        if wires.draw("cut"):
            self.cut()
            return
        self.stalled = self.stalled or wires.draw("stall")
        if self.stalled or wires.is_parted(self.explorer) or wires.draw("lose"):
            return
        frames = [frame, frame] if wires.draw("double") else [frame]
        if self._held is not None:
            frames, self._held = [*frames, self._held], None
        elif wires.draw("mix"):
            self._held = frame
            return
        arrives_at = asyncio.get_running_loop().time() + wires.latency_s()
        for each in frames:
            self._call_at(arrives_at, self.other.arrive, each)

    def arrive(self, frame: bytes) -> None:
        if not self._over:
            self._frames.put_nowait(frame)

    async def receive(self) -> bytes:
        frame = await self._frames.get()
        if frame is None:
            raise LinkLost("the connection has ended")
        return frame

    async def close(self) -> None:
        """The other end hears of it after all that was sent; unless nothing passes."""
        if self._over:
            return
        self.end()
        if self.stalled or self._wires.is_parted(self.explorer):
            return
        self._call_at(asyncio.get_running_loop().time(), self.other.end)

    def _call_at(self, when: float, what: Callable[..., None], *args: bytes) -> None:
        """Then, and after all that came before: of two calls at one time either may be first."""
        self._last_at = max(when, self._last_at + _MOMENT_S)
        asyncio.get_running_loop().call_at(self._last_at, what, *args)

    def cut(self) -> None:
        """Both ends hear of it at once, and what was on its way is lost."""
        self.end()
        self.other.end()

    def end(self) -> None:
        if not self._over:
            self._over = True
            self._frames.put_nowait(None)
            self._wires.forget(self)
