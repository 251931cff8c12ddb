"""Watches an event loop from a thread: what blocks the loop stops all in it that could tell.

A task source whose `next` hangs, a reward that computes, an agent that reads a socket: all of them
hold the one thread in which hub, loop and agents live.
"""

import asyncio
import contextlib
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType

from flash.rollout.stall.stacks import culprit, running_stack

_ADMISSION = "next_start"  # of `Admission`, which asks the task source
_WAITS = 4


@contextlib.contextmanager
def watched_event_loop(timeout_s: float, on_blocked: Callable[[str], None]) -> Iterator[None]:
    """Calls `on_blocked(report)`, in a thread of its own, once the loop has not turned for so long.

    Once for each time that it blocks. Real seconds: a loop under virtual time has no such need.
    """
    loop, owner = asyncio.get_running_loop(), threading.get_ident()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            turned = threading.Event()
            try:
                loop.call_soon_threadsafe(turned.set)
            except RuntimeError:  # it is closed
                return
            # A process that was stopped and goes on finds one wait over at once, not all of them.
            blocked = not any(turned.wait(timeout_s / _WAITS) for _ in range(_WAITS))
            if blocked and not over.is_set():
                on_blocked(_report(sys._current_frames()[owner], timeout_s))
                turned.wait()
            over.wait(timeout_s / _WAITS)

    thread = threading.Thread(target=watch, name="watched event loop", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()  # not joined: it waits for a turn of this very loop


def _report(frame: FrameType, timeout_s: float) -> str:
    stack = traceback.extract_stack(frame)
    lines = running_stack(frame)
    cause = f"the event loop is blocked, at {culprit(lines)} [event_loop_blocked]"
    admission = [place for place, call in enumerate(stack) if call.name == _ADMISSION]
    if admission and admission[0] + 1 < len(stack):
        at = lines[admission[0] + 1]
        cause = f"the task source hangs, and blocks the event loop, at {at} [task_source_hangs]"
    return "\n".join(
        [f"no progress for {timeout_s:.1f} s: {cause}", *(f"      {line}" for line in lines)]
    )
