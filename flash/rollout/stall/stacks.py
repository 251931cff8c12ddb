"""Where a coroutine is: the stack of a task that waits, and of a thread that does not."""

import asyncio
import inspect
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

_LIBRARY = (sys.base_prefix, sys.prefix, "<")
_SOURCES = str(Path(__file__).parents[2])


def waiting_stack(task: asyncio.Task[Any]) -> list[str]:
    """The lines at which a waiting task's coroutines stand, outermost first.

    `Task.get_stack` tells only the outermost one.
    """
    frames = ((frame, frame.f_lineno) for frame in _frames(task.get_coro()))
    return _lines(traceback.StackSummary.extract(frames))


def running_stack(frame: FrameType) -> list[str]:
    """The lines at which a thread stands, outermost first."""
    return _lines(traceback.extract_stack(frame))


def culprit(stack: Sequence[str]) -> str:
    """The innermost line that is not the standard library's or an installed package's."""
    ours = [line for line in stack if not line.startswith(_LIBRARY) or line.startswith(_SOURCES)]
    return (ours or stack)[-1]


def _frames(awaited: Any) -> Iterator[FrameType]:
    while True:
        if inspect.iscoroutine(awaited):
            frame, awaited = awaited.cr_frame, awaited.cr_await
        elif inspect.isgenerator(awaited):
            frame, awaited = awaited.gi_frame, awaited.gi_yieldfrom
        else:
            return
        if frame is not None:
            yield frame


def _lines(stack: traceback.StackSummary) -> list[str]:
    return [f"{call.filename}:{call.lineno} in {call.name}: {call.line}" for call in stack]
