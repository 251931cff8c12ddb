"""An event loop whose clock jumps: hours of waiting take milliseconds, always in the same order.

Only timers, queues and futures may be awaited under it: nothing from outside the loop wakes it.
"""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


class Deadlock(RuntimeError):
    """Every task waits for another one; in real time the program would hang."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Its time stands still while anything can run, then jumps to the next timer."""

    def __init__(self) -> None:
        self._now = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._now

    def jump(self, seconds: float) -> None:
        self._now += seconds


class _JumpingSelector(selectors.DefaultSelector):
    """Where a loop would sleep until its next timer, moves the loop's clock there instead."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if not events:
            if timeout is None:
                raise Deadlock("every task waits for another one:\n" + _tasks(self._loop))
            self._loop.jump(timeout)
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
