"""Workers get new weights in waves: so many at a time as the pool can spare and as loads bear.

    first publish   1, 2, 4, … workers at a time, up to half of the pool
    then            half, and the other half; the next one starts when one has its weights
    loads that slow one another (one disk, one link): back to half as many, for some waves

What a publish costs the workers is the same however many load at a time, but the trainer's slots
are free only when it is over: docs/performance.md has what was simulated.
"""

import asyncio
import math
import statistics
from collections.abc import Awaitable, Callable, Iterable

from flash.errors import PublishFailure, first_error
from flash.hub.slot import Slot

# Where twice as many loads at a time take so much longer, they wait for one another: then it is
# tried again after so many waves, for a worker may be slow for reasons of its own.
_SLOWED, _WAVES_UNTIL_RETRY = 1.5, 8
# Each costs about 0.2 ms until it waits: hundreds at a time must not hold the event loop.
_STARTS_A_TURN = 16

Load = Callable[[Slot], Awaitable[float | None]]


def spared(workers: int) -> int:
    """How many of a pool may be out at a time: half of it, so that the other half samples."""
    return max(1, workers // 2)


def loads_in_a_row(workers: int) -> int:
    """So many loads a publish takes one after another, once the waves have grown."""
    return math.ceil(workers / spared(workers))


class Waves:
    """Gives workers their turn, and learns from how long their loads take how many bear it."""

    def __init__(self) -> None:
        self.size = 1  # so many at a time are known to be quick, or tried
        self._waves_until_growth = 0
        self._smaller_s = math.inf  # of a load in a wave of about half the size
        self._loads_s: list[float] = []  # of this wave

    async def over(self, slots: Iterable[Slot], load: Load, *, most_out: int) -> None:
        """Calls `load` for each, in order, for at most so many at a time.

        It tells how long the load alone took, if there was one. Errors are as for `each`.
        """

        async def turn(slot: Slot) -> None:
            size = self.size
            took_s = await load(slot)
            if took_s is not None and size == self.size:
                self._learn(took_s, most_out)

        await each(slots, turn, room=lambda: min(self.size, most_out))

    def _learn(self, took_s: float, most_out: int) -> None:
        """From a load that began when the present size was in force."""
        self._loads_s.append(took_s)
        size = min(self.size, most_out)
        if len(self._loads_s) < size:
            return
        took_s = statistics.median(self._loads_s)
        self._loads_s = []
        if took_s > _SLOWED * self._smaller_s:
            self.size, self._smaller_s = max(1, size // 2), math.inf
            self._waves_until_growth = _WAVES_UNTIL_RETRY
        elif self._waves_until_growth:
            self._waves_until_growth -= 1
        elif self.size < most_out:
            self.size, self._smaller_s = min(2 * self.size, most_out), took_s


async def each(
    slots: Iterable[Slot],
    turn: Callable[[Slot], Awaitable[None]],
    *,
    room: Callable[[], float] = lambda: math.inf,
) -> None:
    """Calls `turn` for each slot, in order, for at most `room()` of them at a time.

    After a PublishFailure no other begins, and it is raised when those under way are over. Any
    other error, and a cancellation, ends them at once.
    """
    out = started = 0
    back = asyncio.Event()
    failures: list[PublishFailure] = []

    async def one(slot: Slot) -> None:
        nonlocal out
        try:
            await turn(slot)
        except PublishFailure as failure:
            failures.append(failure)
        finally:
            out -= 1
            back.set()

    with first_error():
        async with asyncio.TaskGroup() as turns:
            for slot in slots:
                while out >= room() and not failures:
                    back.clear()
                    await back.wait()
                if failures:
                    break
                out, started = out + 1, started + 1
                turns.create_task(one(slot), name=f"{slot.worker.name} in its turn")
                if started % _STARTS_A_TURN == 0:
                    await asyncio.sleep(0)
    if failures:
        raise failures[0]
