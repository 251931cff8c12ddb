"""What the loop has done of late, for the watchdog to feel."""

import asyncio
import contextlib
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of the loop that is under way."""

    name: str
    since: float


class Pulse:
    """When anything moved last, and when it last brought the next batch nearer.

    Episodes that end bring it nearer only where more of them are ready than ever since the last
    batch: a loop that starts the same episodes again and again moves, and gains nothing.
    """

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.idle_since = 0.0  # when the last call ended
        self.moved_at = 0.0
        self.gained_at = 0.0
        self.ended_since_gain: Counter[str] = Counter()
        self._most_ready = 0

    def start(self) -> None:
        self.idle_since = self.moved_at = self.gained_at = _now()

    def ended(self, outcome: str, reason: str) -> None:
        """An episode has its outcome. What was given up on purpose is no sign of anything."""
        self.moved_at = _now()
        if reason in ("stall", "redundant"):
            return
        self.ended_since_gain[f"{outcome}({reason})" if reason else outcome] += 1

    def ready(self, count: int) -> None:
        """An episode came to its end: so many wait for a batch now."""
        self.moved_at = _now()
        if count > self._most_ready:
            self._most_ready = count
            self._gain()

    def handed_over(self, left: int) -> None:
        """A batch went to the trainer; so many episodes are ready for the next one."""
        self.moved_at = _now()
        self._most_ready = left
        self._gain()

    @contextlib.contextmanager
    def doing(self, name: str) -> Iterator[None]:
        """While the caller of the loop waits in this call."""
        call = Call(name, _now())
        self.calls.append(call)
        try:
            yield
        finally:
            self.calls.remove(call)
            self.idle_since = self.moved_at = _now()

    def _gain(self) -> None:
        self.gained_at = _now()
        self.ended_since_gain.clear()


class _HasPulse(Protocol):
    @property
    def pulse(self) -> Pulse: ...


_L = TypeVar("_L", bound=_HasPulse)


def felt(
    method: Callable[Concatenate[_L, _P], Awaitable[_T]],
) -> Callable[Concatenate[_L, _P], Coroutine[Any, Any, _T]]:
    """A method of the loop, known to its pulse while it is under way."""

    @functools.wraps(method)
    async def call(loop: _L, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with loop.pulse.doing(method.__name__):
            return await method(loop, *args, **kwargs)

    return call


def _now() -> float:
    return asyncio.get_running_loop().time()
