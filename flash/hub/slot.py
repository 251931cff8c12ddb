"""What the hub remembers of a worker, of a request that waits, and of an answer on its way."""

import asyncio
import math
from dataclasses import dataclass, field

from flash.hub.loan import Lent
from flash.hub.worker import Worker
from flash.types import Completion, GenerateRequest


@dataclass(slots=True, eq=False)
class Slot:
    """A worker and what it has been given.

    `version` is set once the worker has been told it: no token sampled from then on is older.
    """

    worker: Worker
    version: int
    healthy: bool = True
    gone: bool = False
    updating: bool = False
    lent: Lent | None = None
    up: asyncio.Event = field(default_factory=asyncio.Event)  # its process lives, if it is ours
    failures: int = 0  # since its last good answer
    streams: bool = False  # it has told of tokens before an answer was whole
    progress_at: float = 0.0  # of the last tokens or answer
    progress_timer: asyncio.TimerHandle | None = None
    outstanding_tokens: int = 0
    deadlines: dict[str, asyncio.Timeout] = field(default_factory=dict)
    running: int = 0
    busy_s: float = 0.0
    busy_since: float = 0.0

    @property
    def accepting(self) -> bool:
        return self.healthy and not self.updating and self.lent is None


@dataclass(slots=True, eq=False)
class Waiter:
    arrival: int
    request: GenerateRequest
    cost: int
    slot: asyncio.Future[Slot]


@dataclass(slots=True, eq=False)
class Received:
    """The tokens of an answer that is not whole yet, as far as their version is certain."""

    version: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def as_aborted(self, worker: str) -> Completion:
        """What is worth keeping of it when its worker has failed."""
        known = all(map(math.isfinite, self.logprobs))
        return Completion(
            token_ids=self.token_ids if known else [],
            logprobs=self.logprobs if known else [],
            versions=[self.version] * len(self.token_ids) if known else [],
            finish_reason="abort",
            worker=worker,
        )
