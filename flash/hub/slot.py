"""What the hub knows of a worker and has given to it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from flash.deadline import Deadline
from flash.hub.loan import LentWorker
from flash.hub.reports import WorkerStats
from flash.hub.worker import Worker, WorkerFailure

_CONTROL = "control"  # where a request has its id; a worker has one such call at a time


@dataclass(slots=True, eq=False)
class Slot:
    """A worker and what it has been given.

    `version` is set once the worker has been told it: no token sampled from then on is older.
    """

    worker: Worker
    version: int
    healthy: bool = True
    lost: bool = False  # its process died, and nobody starts it again
    updating: bool = False
    asleep: bool = False  # its GPU is the trainer's meanwhile, and its weights are gone
    lent: LentWorker | None = None
    started: asyncio.Event = field(default_factory=asyncio.Event)  # clear while a pool restarts it
    failures: int = 0  # since its last good answer
    streams: bool = False  # it has told of tokens before an answer was whole
    progress_at: float = 0.0  # of the last tokens or answer
    progress_timer: asyncio.TimerHandle | None = None
    outstanding_tokens: int = 0
    deadlines: dict[str, Deadline] = field(default_factory=dict)
    running: int = 0
    busy_s: float = 0.0
    busy_since: float = 0.0

    def __post_init__(self) -> None:
        self.started.set()

    @property
    def accepting(self) -> bool:
        return self.healthy and not self.updating and not self.asleep and self.lent is None

    def begin(self, cost: int) -> None:
        """A request of so many tokens at most is given to it."""
        if self.running == 0:
            self.busy_since = self.progress_at = _now()
        self.running += 1
        self.outstanding_tokens += cost

    def end(self, cost: int) -> None:
        """That request is over."""
        self.running -= 1
        self.outstanding_tokens -= cost
        if self.running == 0 and not self.asleep:
            self.busy_s += _now() - self.busy_since

    def fall_asleep(self) -> None:
        """Its requests wait with it, and no time passes for them."""
        if self.running:
            self.busy_s += _now() - self.busy_since
        self.asleep = True
        for deadline in self.deadlines.values():
            deadline.stop()

    def awake(self) -> None:
        """It goes on with them."""
        self.asleep = False
        self.busy_since = self.progress_at = _now()
        for deadline in self.deadlines.values():
            deadline.go_on()

    def expire_calls(self) -> None:
        """Ends every call to this worker now, as if it had taken too long."""
        for deadline in self.deadlines.values():
            deadline.expire_soon()

    @contextlib.asynccontextmanager
    async def control(self, timeout_s: float) -> AsyncIterator[None]:
        """Ends a control call with WorkerFailure: in time, or when the worker is excluded."""
        try:
            with Deadline(timeout_s) as deadline:
                self.deadlines[_CONTROL] = deadline
                try:
                    yield
                finally:
                    del self.deadlines[_CONTROL]
        except TimeoutError as error:
            raise WorkerFailure(
                f"{self.worker.name} was excluded, or took longer than {timeout_s:g} s for a "
                f"pause, a weight load or a health check"
            ) from error

    def stats(self, now: float, *, request_timeout_s: float) -> WorkerStats:
        """A snapshot."""
        due = [deadline.due for key, deadline in self.deadlines.items() if key != _CONTROL]
        ages_s = [now - (when - request_timeout_s) for when in due]
        lent_s = self.lent.busy_s if self.lent is not None else 0.0
        return WorkerStats(
            name=self.worker.name,
            healthy=self.healthy,
            version=self.version,
            running=self.running,
            outstanding_tokens=self.outstanding_tokens,
            busy_s=self.busy_s
            + lent_s
            + (now - self.busy_since) * (self.running > 0 and not self.asleep),
            updating=self.updating,
            asleep=self.asleep,
            lent=self.lent is not None,
            quiet_s=(now - self.progress_at) * (self.running > 0),
            oldest_s=max(ages_s, default=0.0),
            newest_s=min(ages_s, default=0.0),
        )


def _now() -> float:
    return asyncio.get_running_loop().time()
