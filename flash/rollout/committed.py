"""The seam between a loop and the log that makes what happened outlive a crash."""

from collections.abc import Callable
from typing import Protocol

INTERRUPTED = "interrupted"
"""Reason of what was cut off where it was played, and goes on as another episode."""

SHUTDOWN = "shutdown"
OVER = "over"
LEFT = (SHUTDOWN, OVER)
"""Reasons of what a run leaves to its next start: it ends now, or it has no batch to come for it.

Where there is a log, that is no outcome yet.
"""


class CommitLog(Protocol):
    """Writes down what its run's observers are told; it is one of them."""

    @property
    def blocked(self) -> str:
        """Why nothing new should begin; empty if it may."""
        ...

    def after_commit(self, then: Callable[[], None]) -> None:
        """Calls once all that was told until now would outlive a crash, perhaps at once.

        From the event loop; never, if that can't be any more.
        """
        ...

    async def committed(self) -> None:
        """Waits for that; LogFailure if it can't be any more."""
        ...


class NoLog:
    """Nothing outlives a crash, and nothing waits for it."""

    blocked = ""

    def after_commit(self, then: Callable[[], None]) -> None:
        then()

    async def committed(self) -> None:
        pass
