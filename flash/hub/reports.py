"""What the hub tells of itself: how a publish went, and its numbers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPublish:
    """How a publish went at one worker. `gap` is nan if it was not probed."""

    name: str
    updated: bool
    paused_s: float
    gap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """How a publish went. `gap_max` is nan if no worker was probed: the weights came without
    `score`, or every worker was out (each has the weights before it comes back)."""

    version: int
    gap_max: float
    paused_s: float
    workers: int
    per_worker: tuple[WorkerPublish, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStats:
    """One worker as the hub sees it."""

    name: str
    healthy: bool
    version: int
    running: int
    outstanding_tokens: int
    busy_s: float
    updating: bool = False
    lent: bool = False
    quiet_s: float = 0.0  # since its last tokens or answer, while it has requests
    oldest_s: float = 0.0  # since the first of the requests that it has
    newest_s: float = 0.0  # since the last of them


@dataclass(frozen=True, slots=True, kw_only=True)
class HubStats:
    """Totals since the start, and what is under way now."""

    version: int
    queued: int
    running: int
    prompt_tokens: int
    generated_tokens: int
    requests: int
    retries: int
    publishes: int
    paused_s: float
    workers: tuple[WorkerStats, ...]
