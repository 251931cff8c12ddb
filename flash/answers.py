"""What a user's code may answer: read where it enters, and told in few words where it is wrong."""

import asyncio
import contextlib
import reprlib
import signal
import traceback
from collections.abc import Iterator
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np

from flash.errors import EpisodeFailure, InferenceFailure

_LARGEST = float(np.finfo(np.float32).max)  # rewards are trained on as float32

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 120
_short.maxlong = 40


def number(value: Any) -> float | None:
    """A finite number, or None if it is none.

    Scalars of NumPy and torch are numbers; true and false are 1 and 0; a text never is one.
    """
    value = _scalar(value)
    if not isinstance(value, Real | Decimal):
        return None
    try:
        real = float(value)
    except (OverflowError, ValueError):
        return None
    return real if abs(real) <= _LARGEST else None


def truth(value: Any) -> bool | None:
    """True or false, also NumPy's; None if it is neither."""
    value = _scalar(value)
    return value if isinstance(value, bool) else None


def shown(value: object) -> str:
    """How it looks, shortened: for errors, whatever its size and its `__repr__`."""
    return _short.repr(value)


def raised(error: BaseException, *, ours: int = 1) -> str:
    """What was raised, and the last line that it passed of the file that we called.

    `ours`: how many of the frames that it passed are ours.
    """
    frames = traceback.extract_tb(error.__traceback__)[ours:]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    where = f" in {own[-1].filename}, line {own[-1].lineno}" if own else ""
    return f"raised {shown(error)}{where}"


@contextlib.contextmanager
def failing_as(failure: type[EpisodeFailure], who: str) -> Iterator[None]:
    """Around the await of a user's coroutine: what it raises, `sys.exit` too, is that failure.

    What is nobody's fault here passes, and so does a cancellation that is meant for this task.
    """
    try:
        yield
    except (EpisodeFailure, InferenceFailure, GeneratorExit):
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise failure(f"{who} cancelled itself") from error
    except BaseException as error:  # the boundary to the user's code
        if is_ctrl_c(error):
            raise
        raise failure(f"{who} {raised(error, ours=2)}") from error


def is_ctrl_c(error: BaseException) -> bool:
    """Whether it may come from the keyboard, and not from code that raises it.

    Where an event loop listens to SIGINT, Python itself raises nothing.
    """
    listens = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    return isinstance(error, KeyboardInterrupt) and not listens


def _scalar(value: Any) -> Any:
    """As Python has it, if it is an array or a tensor without axes."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        with contextlib.suppress(Exception):  # of a tensor without data, say
            return value.item()
    return value
