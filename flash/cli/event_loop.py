"""The event loop of a command: uvloop, garbage by the clock, an end on request."""

import asyncio
import gc
import signal
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

from flash.machine import raise_open_file_limit

_T = TypeVar("_T")
_GARBAGE_EVERY_S = 300.0


def run_loop(main: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine as the commands do: on uvloop, with garbage collected by the clock, and with
    as many files as may be.

    Python counts what is made less what is dropped, so while old episodes go, new ones gather in
    its youngest generation, and a look at them holds the loop for 0.1 s. Next to nothing of a run
    is cyclic garbage: a full look at rare intervals finds it.
    """
    import uvloop  # noqa: PLC0415  (only a run needs it)

    async def collecting() -> _T:
        _collect_by_the_clock(asyncio.get_running_loop())
        return await main

    raise_open_file_limit()
    gc.disable()
    try:
        return uvloop.run(collecting())
    finally:
        gc.enable()


def _collect_by_the_clock(loop: asyncio.AbstractEventLoop) -> None:
    def collect() -> None:
        gc.collect()
        loop.call_later(_GARBAGE_EVERY_S, collect)

    loop.call_later(_GARBAGE_EVERY_S, collect)


def stop_on_signals() -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; the second one ends the process as it always would."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ask() -> None:
        print("stopping after this step; once more to stop at once", file=sys.stderr)
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask)
    return stop
