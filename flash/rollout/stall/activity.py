"""What a loop has done of late, for the watchdog to judge."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from flash.rollout.episode import Episode
from flash.rollout.observer import Observer
from flash.rollout.record import EpisodeRecord
from flash.types import Batch


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One call of the loop that is under way."""

    name: str
    since: float


class Activity(Observer):
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
        self._ready = self._most_ready = 0

    def start(self) -> None:
        self.idle_since = self.moved_at = self.gained_at = _now()

    @contextlib.contextmanager
    def call(self, name: str) -> Iterator[None]:
        """While the caller of the loop waits in this call."""
        call = Call(name, _now())
        self.calls.append(call)
        try:
            yield
        finally:
            self.calls.remove(call)
            self.idle_since = self.moved_at = _now()

    # ── what it hears of ─────────────────────────────────────────────────────────────────────

    def played(self, episode: Episode) -> None:
        if episode.trajectory is None:
            return
        self.moved_at = _now()
        self._ready += 1
        if self._ready > self._most_ready:
            self._most_ready = self._ready
            self._gain()

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        self.moved_at = _now()
        self._ready -= episode.trajectory is not None
        if record.reason in ("stall", "redundant"):
            return  # what was given up on purpose is no sign of anything
        outcome, reason = record.outcome, record.reason
        self.ended_since_gain[f"{outcome}({reason})" if reason else outcome] += 1

    def handed_over(self, batch: Batch) -> None:
        if batch.last:
            self.moved_at = _now()
            self._most_ready = self._ready
            self._gain()

    def _gain(self) -> None:
        self.gained_at = _now()
        self.ended_since_gain.clear()


def _now() -> float:
    return asyncio.get_running_loop().time()
