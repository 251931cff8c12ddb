"""Requests that wait for room at a worker, and which worker each of them gets."""

import asyncio
import bisect
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass

from flash.errors import InferenceFailure
from flash.hub.slot import Slot
from flash.types import GenerateRequest

_SESSIONS_KEPT = 100_000  # routing hints only: losing one costs a prefill
# How much busier the worker with the prefix may be. A request more slows a batch by a little, a
# prefix costs its whole prefill; with these, agents of 20 turns find nine tenths of theirs.
_BUSIER_FACTOR, _BUSIER_REQUESTS = 1.25, 4
# Each costs about 0.2 ms until its answer is read: a burst of thousands must not hold the loop.
_STARTS_A_TURN = 16


_Load = tuple[int, int]  # tokens outstanding at a slot, its place among the slots


@dataclass(slots=True, eq=False)
class _Waiter:
    arrival: int
    request: GenerateRequest
    cost: int
    slot: asyncio.Future[Slot]


class RequestQueue:
    """First come, first served, by whichever of `slots` is best.

    The slots are the hub's own list, which it fills at its start. Who lets one accept again calls
    `accepts`. Once closed, every caller gets the failure, now and later.
    """

    def __init__(self, slots: Sequence[Slot], *, max_running: int) -> None:
        self.failure: InferenceFailure | None = None  # that it was closed with
        self._slots = slots
        self._max_running = max_running
        # By arrival. Bound: one entry for each caller; the agents are bounded by their loop.
        self._waiting: deque[_Waiter] = deque()
        self._started_this_turn = 0
        self._last_slot: OrderedDict[str, Slot] = OrderedDict()  # of a session, of a pin
        # (outstanding tokens, place) of every slot that accepts and has room, the least loaded
        # first: among thousands of workers one is found without looking at the others. Those that
        # accept no more are there until they are first.
        self._free: list[_Load] = []
        self._loads: list[_Load | None] = []  # what `_free` has of a slot, by its place
        self._places: dict[Slot, int] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    async def acquire(self, request: GenerateRequest, *, cost: int, arrival: int) -> Slot:
        """Waits for room at a worker; `release` gives it back."""
        self.raise_failure()
        if self._started_this_turn < _STARTS_A_TURN:  # room that others wait for is theirs by now
            least = self._least_loaded()
            if least is not None and (slot := self._best(request, least)) is not None:
                self._give(slot, request, cost)
                return slot
        waiter = _Waiter(arrival, request, cost, asyncio.get_running_loop().create_future())
        if self._waiting and self._waiting[-1].arrival > arrival:  # it lost its worker
            bisect.insort(self._waiting, waiter, key=lambda other: other.arrival)
        else:
            self._waiting.append(waiter)
        self._dispatch()
        try:
            return await waiter.slot
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif not waiter.slot.cancelled() and waiter.slot.exception() is None:
                self.release(waiter.slot.result(), cost=cost)
            raise

    def release(self, slot: Slot, *, cost: int) -> None:
        slot.end(cost)
        self._sort(slot)
        self._dispatch()

    def accepts(self, slot: Slot) -> None:
        """A worker may take requests again."""
        self._meet_new_ones()
        self._sort(slot)
        self._dispatch()

    def _dispatch(self) -> None:
        """Gives room to those that wait, first come first served, a few in a turn of the loop."""
        passed = 0  # they wait for the one worker that their pin allows
        while passed < len(self._waiting) and self._started_this_turn < _STARTS_A_TURN:
            if (least := self._least_loaded()) is None:
                return
            waiter = self._waiting[passed]
            if waiter.slot.done():  # its caller was cancelled
                del self._waiting[passed]
                continue
            slot = self._best(waiter.request, least)
            if slot is None:
                passed += 1
                continue
            del self._waiting[passed]
            self._give(slot, waiter.request, waiter.cost)
            waiter.slot.set_result(slot)

    def _give(self, slot: Slot, request: GenerateRequest, cost: int) -> None:
        if self._started_this_turn == 0:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._started_this_turn += 1
        slot.begin(cost)
        self._sort(slot)
        for key in (request.session, request.pin):
            if key:
                self._last_slot[key] = slot
                self._last_slot.move_to_end(key)
                if len(self._last_slot) > _SESSIONS_KEPT:
                    self._last_slot.popitem(last=False)

    def _next_turn(self) -> None:
        self._started_this_turn = 0
        self._dispatch()

    def _best(self, request: GenerateRequest, least: Slot) -> Slot | None:
        """The worker that has the prefix, unless it is much busier; else the least loaded. None
        if its pin allows one alone, which has no room."""
        if (pinned := self._pinned_to(request)) is not None:
            return pinned if pinned.running < self._max_running else None
        last = self._last_slot.get(request.session)
        if last is None or last is least:
            return least
        if last.running == self._max_running or not last.accepting:
            return least
        much_busier = last.running > _BUSIER_FACTOR * least.running + _BUSIER_REQUESTS
        return least if much_busier else last

    def _least_loaded(self) -> Slot | None:
        """Of those that accept and have room; of equals the first."""
        if len(self._places) < len(self._slots):
            self._meet_new_ones()
        while self._free:
            slot = self._slots[self._free[0][1]]
            if slot.accepting:
                return slot
            self._sort(slot)
        return None

    def _meet_new_ones(self) -> None:
        for place in range(len(self._places), len(self._slots)):
            self._places[self._slots[place]] = place
            self._loads.append(None)
            self._sort(self._slots[place])

    def _sort(self, slot: Slot) -> None:
        """To where its load belongs among the free ones, or out of them."""
        place = self._places[slot]
        if (load := self._loads[place]) is not None:
            del self._free[bisect.bisect_left(self._free, load)]
        self._loads[place] = None
        if slot.accepting and slot.running < self._max_running:
            self._loads[place] = load = (slot.outstanding_tokens, place)
            bisect.insort(self._free, load)

    def _pinned_to(self, request: GenerateRequest) -> Slot | None:
        """The worker that the request must go to, as long as that takes any."""
        slot = self._last_slot.get(request.pin) if request.pin else None
        return slot if slot is not None and slot.accepting else None

    def forget(self, session: str) -> None:
        self._last_slot.pop(session, None)

    def whereabouts(self, session: str) -> str:
        """Where the session's request is, or was last: `queue`, a worker's name, or nothing."""
        if any(waiter.request.session == session for waiter in self._waiting):
            return "queue"
        slot = self._last_slot.get(session)
        return slot.worker.name if slot is not None else ""

    def close(self, failure: InferenceFailure) -> None:
        """Every caller gets this failure; the first one is the cause and stays."""
        self.failure = self.failure or failure
        for waiter in self._waiting:
            if not waiter.slot.done():
                waiter.slot.set_exception(_copy(self.failure))
        self._waiting.clear()

    def raise_failure(self) -> None:
        """If it is closed."""
        if self.failure is not None:
            raise _copy(self.failure)


def _copy(failure: InferenceFailure) -> InferenceFailure:
    """The failure for one caller: an error that many raise would grow their tracebacks."""
    copy = InferenceFailure(str(failure))
    copy.__cause__ = failure.__cause__
    return copy
