"""Requests that wait for a place at a worker, and which worker each of them gets."""

import asyncio
import bisect
from collections import OrderedDict, deque
from collections.abc import Sequence

from flash.errors import InferenceFailure
from flash.hub.slot import Slot, Waiter
from flash.types import GenerateRequest

_SESSIONS_KEPT = 100_000  # routing hints only: losing one costs a prefill
# How much busier the worker with the prefix may be. A request more slows a batch by a little, a
# prefix costs its whole prefill; with these, agents of 20 turns find nine tenths of theirs.
_HOME_SHARE, _HOME_MORE = 1.25, 4
# Each costs about 0.2 ms until its answer is read: a burst of thousands must not hold the loop.
_PLACES_A_TURN = 16


class RequestQueue:
    """First come, first served, by whichever of `slots` is best.

    The slots are the hub's own list, which it fills at its start. Who changes whether one accepts
    calls `dispatch`. Once closed, every caller gets the failure, now and later.
    """

    def __init__(self, slots: Sequence[Slot], *, max_running: int) -> None:
        self.failure: InferenceFailure | None = None  # that it was closed with
        self._slots = slots
        self._max_running = max_running
        # By arrival. Bound: one entry for each caller; the agents are bounded by their loop.
        self._waiting: deque[Waiter] = deque()
        self._given_this_turn = 0
        self._sessions: OrderedDict[str, Slot] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    async def acquire(self, request: GenerateRequest, *, cost: int, arrival: int) -> Slot:
        """Waits for a place at a worker; `release` gives it back."""
        self.raise_failure()
        waiter = Waiter(arrival, request, cost, asyncio.get_running_loop().create_future())
        if self._waiting and self._waiting[-1].arrival > arrival:  # it lost its worker
            bisect.insort(self._waiting, waiter, key=lambda other: other.arrival)
        else:
            self._waiting.append(waiter)
        self.dispatch()
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
        self.dispatch()

    def dispatch(self) -> None:
        """Gives places to those that wait, first come first served, a few in a turn of the loop."""
        passed = 0  # they wait for a worker of their own
        while passed < len(self._waiting) and self._given_this_turn < _PLACES_A_TURN:
            waiter = self._waiting[passed]
            if waiter.slot.done():  # its caller was cancelled
                del self._waiting[passed]
                continue
            slot = self._best(waiter.request)
            if slot is None:
                if self._place_of(waiter.request) is None:
                    return
                passed += 1
                continue
            if self._given_this_turn == 0:
                asyncio.get_running_loop().call_soon(self._next_turn)
            self._given_this_turn += 1
            del self._waiting[passed]
            slot.begin(waiter.cost)
            for session in (waiter.request.session, waiter.request.place):
                if session:
                    self._sessions[session] = slot
                    self._sessions.move_to_end(session)
                    if len(self._sessions) > _SESSIONS_KEPT:
                        self._sessions.popitem(last=False)
            waiter.slot.set_result(slot)

    def _next_turn(self) -> None:
        self._given_this_turn = 0
        self.dispatch()

    def _best(self, request: GenerateRequest) -> Slot | None:
        """The worker that has the prefix, unless it is much busier; else the least loaded."""
        if (place := self._place_of(request)) is not None:
            return place if place.running < self._max_running else None
        least: Slot | None = None
        for slot in self._slots:  # a plain loop: hundreds of workers are asked for each request
            if slot.running == self._max_running or not slot.accepting:
                continue
            if least is None or slot.outstanding_tokens < least.outstanding_tokens:
                least = slot
        home = self._sessions.get(request.session)
        if least is None or home is None or home is least:
            return least
        if home.running == self._max_running or not home.accepting:
            return least
        return home if home.running <= _HOME_SHARE * least.running + _HOME_MORE else least

    def _place_of(self, request: GenerateRequest) -> Slot | None:
        """The worker that the request must go to, as long as that takes any."""
        place = self._sessions.get(request.place) if request.place else None
        return place if place is not None and place.accepting else None

    def forget(self, session: str) -> None:
        self._sessions.pop(session, None)

    def whereabouts(self, session: str) -> str:
        """Where the session's request is, or was last: `queue`, a worker's name, or nothing."""
        if any(waiter.request.session == session for waiter in self._waiting):
            return "queue"
        slot = self._sessions.get(session)
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
