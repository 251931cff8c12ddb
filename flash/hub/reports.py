"""What the hub tells of itself: how a publish went, and its numbers."""

from dataclasses import dataclass

from flash.hub.probe import Gap


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPublish:
    """How a publish went at one worker. `gap` is None if it was not probed.

    Of `paused_s` it loaded the weights for `load_s`, and for `reset_s` it dropped the keys and
    values of what runs, which is computed anew after the pause; most of the rest is the step that
    was under way, or with `wait` its requests.
    """

    name: str
    updated: bool
    paused_s: float
    load_s: float
    reset_s: float
    gap: Gap | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """How a publish went; seconds are summed over workers. `gap` has the worst of each number of
    any worker; None if none was probed: the weights came without `score`, or every worker was out
    (each has the weights before it comes back). `changed` is that of the weights."""

    version: int
    gap: Gap | None
    paused_s: float
    load_s: float
    reset_s: float
    workers: int
    per_worker: tuple[WorkerPublish, ...]
    changed: float | None = None


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
    asleep: bool = False
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
    load_s: float
    reset_s: float
    mixed_tokens: int  # that may have seen keys and values of older weights than their own
    workers: tuple[WorkerStats, ...]
