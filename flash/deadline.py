"""Deadlines of calls that are made thousands of times a second."""

import asyncio
from collections.abc import Callable, MutableMapping
from types import TracebackType
from typing import Self
from weakref import WeakKeyDictionary, ref


class Deadline:
    """`asyncio.timeout`, at a quarter of its cost: calls of one length share a timer.

    It is for lengths that come from settings, of which there are few.

    >>> with Deadline(timeout_s) as deadline:
    ...     await something

    Past it what is awaited is cancelled, and the block raises TimeoutError; `expired` then tells it
    from a TimeoutError of somebody else's.
    """

    __slots__ = (
        *("_cancelling", "_left_s", "_line", "_over", "_task", "_timeout_s", "_timer"),
        *("due", "expired"),
    )

    def __init__(self, timeout_s: float) -> None:
        self.expired = False
        self._over = False
        self._timer: asyncio.TimerHandle | None = None  # of one that was stopped once
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        if task is None:
            raise RuntimeError("a deadline is for what a task does")
        self._task, self._cancelling = task, task.cancelling()
        self.due = loop.time() + self._timeout_s
        self._line = line = _lines.get(loop, self._timeout_s)
        line.calls[self] = None
        if not line.timed:
            line.arm(loop, self.due)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over = True
        self._untime()
        # Another request to cancel than this one is somebody else's, and goes on.
        alone = self.expired and self._task.uncancel() <= self._cancelling
        if alone and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def stop(self) -> None:
        """Until `go_on` no time passes."""
        self._untime()
        self._left_s = self.due - self._task.get_loop().time()

    def go_on(self) -> None:
        """After `stop`."""
        loop = self._task.get_loop()
        self.due = loop.time() + self._left_s
        if not self._over:
            self._timer = loop.call_at(self.due, self.expire)

    def _untime(self) -> None:
        self._line.calls.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def expire_soon(self) -> None:
        """As if the time had passed, from the next turn of the loop."""
        self._task.get_loop().call_soon(self.expire)

    def expire(self) -> None:
        if not self._over and not self.expired:
            self.expired = True
            self._task.cancel()


class _Line:
    """Calls of one length, in the order in which they are due, which is that of their beginning."""

    __slots__ = ("calls", "timed")

    def __init__(self) -> None:
        self.calls: dict[Deadline, None] = {}
        self.timed = False

    def arm(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        self.timed = True
        loop.call_at(due, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """The timer was for a call that may be over since; it goes on with the one due next."""
        self.timed = False
        now = loop.time()
        while self.calls:
            call = next(iter(self.calls))
            if call.due > now:
                self.arm(loop, call.due)
                return
            del self.calls[call]
            call.expire()


class _Lines:
    """Of every loop. No entry holds its loop: the timer of a line that is empty does, until it has
    passed."""

    def __init__(self) -> None:
        self._of: MutableMapping[asyncio.AbstractEventLoop, dict[float, _Line]]
        self._of = WeakKeyDictionary()
        # Nearly always the one that is asked for; together, as other threads have other loops.
        self._latest: tuple[Callable[[], asyncio.AbstractEventLoop | None], dict[float, _Line]]
        self._latest = (lambda: None), {}

    def get(self, loop: asyncio.AbstractEventLoop, timeout_s: float) -> _Line:
        of_loop, lines = self._latest
        if of_loop() is not loop:
            lines = self._of.setdefault(loop, {})
            self._latest = ref(loop), lines
        line = lines.get(timeout_s)
        if line is None:
            line = lines[timeout_s] = _Line()
        return line


_lines = _Lines()
