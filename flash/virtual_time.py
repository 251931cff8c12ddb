"""An event loop whose clock jumps: hours of waiting take milliseconds, always in the same order.

Only timers, queues and futures may be awaited under it: nothing from outside the loop wakes it.
"""

import asyncio
import contextvars
import functools
import heapq
import itertools
import math
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar, TypeVarTuple

_SAME_TIME_S = 1e-9  # what sums of the same seconds in another order may differ by
_CANCELLED_KEPT = 100  # timers, until the heap is made anew without them

_P = ParamSpec("_P")
_T = TypeVar("_T")
_Ts = TypeVarTuple("_Ts")


class Deadlock(RuntimeError):
    """Every task waits for another one; in real time the program would hang."""


class _Handle(asyncio.TimerHandle):
    __slots__ = ("waits",)
    waits: bool  # until it is due


_Timer = tuple[float, int, _Handle]  # when it is due, its number


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Its time stands still while anything can run, then jumps to the next timer.

    Timers that are due at the same time are called in the order in which they were set.
    """

    def __init__(self) -> None:
        self._now = 0.0
        # Not asyncio's own heap: that compares handles, in Python, which took a tenth of a
        # simulation's time.
        self._timers: list[_Timer] = []
        self._numbers = itertools.count()
        self._cancelled = 0  # of the timers
        super().__init__(_JumpingSelector(self))
        loop: Any = self
        self._call_now: Callable[[asyncio.Handle], None] = loop._ready.append

    def time(self) -> float:
        return self._now

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Ts], object],
        *args: *_Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        handle = _Handle(when, callback, args, self, context)
        handle.waits = True
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def _timer_handle_cancelled(self, handle: "_Handle") -> None:
        """asyncio's handles tell their loop."""
        if not handle.waits:
            return
        self._cancelled += 1
        if self._cancelled > max(_CANCELLED_KEPT, len(self._timers) // 2):
            self._timers = [timer for timer in self._timers if not timer[2].cancelled()]
            heapq.heapify(self._timers)
            self._cancelled = 0

    def next_timer_at(self) -> float:
        """When the next timer is due; infinity if there is none."""
        timers = self._timers
        while timers and timers[0][2].cancelled():
            heapq.heappop(timers)
            self._cancelled -= 1
        return timers[0][0] if timers else math.inf

    def jump(self, *, idle: bool) -> bool:
        """Makes ready what is due; if `idle`, at the time of the next timer. False if none is."""
        if idle:
            if (when := self.next_timer_at()) == math.inf:
                return False
            self._now = max(self._now, when)
        timers = self._timers
        while timers and timers[0][0] < self._now + _SAME_TIME_S:
            _, _, handle = heapq.heappop(timers)
            handle.waits = False
            if handle.cancelled():
                self._cancelled -= 1
            else:
                self._call_now(handle)
        return True


class _JumpingSelector(selectors.DefaultSelector):
    """Where a loop would sleep, moves the loop's clock to its next timer instead."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        # While anything can run nobody outside is listened to: that would be a system call a turn.
        events = super().select(0) if timeout is None else []
        if not self._loop.jump(idle=timeout is None and not events):
            raise Deadlock("every task waits for another one:\n" + _tasks(self._loop))
        return events


def run(main: Coroutine[Any, Any, _T]) -> _T:
    """Like `asyncio.run`, under virtual time. Raises Deadlock where that would hang."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def in_virtual_time(main: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, _T]:
    """A coroutine function as a plain one that runs it under virtual time: for tests."""

    @functools.wraps(main)
    def under_virtual_time(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return run(main(*args, **kwargs))

    return under_virtual_time


def _tasks(loop: asyncio.AbstractEventLoop) -> str:
    return "\n".join(f"  {task.get_name()}: {task.get_coro()}" for task in asyncio.all_tasks(loop))
