"""The event loop of a command: uvloop, garbage by the clock, an end on request."""

import asyncio
import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

from flash.system.machine import raise_open_file_limit

_T = TypeVar("_T")
_GARBAGE_EVERY_S = 300.0
_GARBAGE_SHARE = 1e-3  # of the time, at most


def run_loop(
    main: Coroutine[Any, Any, _T],
    *,
    stop: asyncio.Event | None = None,
    stopping: str = "stopping after this step",
) -> _T:
    """Runs a coroutine as the commands do: on uvloop, with garbage collected by the clock, and with
    as many files as may be.

    The first SIGINT or SIGTERM sets `stop`, if there is one, and says `stopping`; the next one
    cancels the coroutine, which raises SystemExit with the usual code; one more ends the process
    at once.

    Python counts what is made less what is dropped, so while old episodes go, new ones gather in
    its youngest generation, and a look at them holds the loop for 0.1 s. Next to nothing of a run
    is cyclic garbage: a full look at rare intervals finds it, at what was made since the start. It
    takes 1 s with 16,384 agents: the longer it takes, the rarer it is.
    """
    import uvloop  # noqa: PLC0415  (only a run needs it)

    signals = _Signals()

    async def collecting() -> _T:
        _collect_by_the_clock(asyncio.get_running_loop())
        with signals.answered(*([_asking(stop, stopping)] if stop else []), _cancelling()):
            return await main

    raise_open_file_limit()
    gc.disable()
    gc.freeze()
    try:
        return uvloop.run(collecting())
    except asyncio.CancelledError:
        raise SystemExit(128 + signals.last) from None
    finally:
        gc.unfreeze()
        gc.enable()


def _asking(stop: asyncio.Event, stopping: str) -> Callable[[], None]:
    def ask() -> None:
        print(f"{stopping}; once more to stop at once", file=sys.stderr)
        stop.set()

    return ask


def _cancelling() -> Callable[[], object]:
    task = asyncio.current_task()
    assert task is not None
    return task.cancel


class _Signals:
    """SIGINT and SIGTERM, each answered in its turn; `last` is the one that came last."""

    def __init__(self) -> None:
        self.last = 0

    @contextlib.contextmanager
    def answered(self, *answers: Callable[[], object]) -> Iterator[None]:
        """The nth one calls the nth answer, from the loop; the process ends at one more.

        By Python's own handlers, because that one must be heard while something holds the loop.
        """
        loop, left = asyncio.get_running_loop(), iter(answers)

        def hear(number: int, _: object) -> None:
            self.last = number
            if (answer := next(left, None)) is None:
                os._exit(128 + number)  # the children end with it
            loop.call_soon_threadsafe(answer)

        before = {n: signal.signal(n, hear) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _collect_by_the_clock(loop: asyncio.AbstractEventLoop) -> None:
    def collect() -> None:
        began_s = time.perf_counter()
        gc.collect()
        took_s = time.perf_counter() - began_s
        loop.call_later(max(_GARBAGE_EVERY_S, took_s / _GARBAGE_SHARE), collect)

    loop.call_later(_GARBAGE_EVERY_S, collect)
