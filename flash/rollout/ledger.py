"""The ledger of outcomes: each admitted episode ends in exactly one, and the counts add up."""

from collections import Counter
from typing import Any

from flash.rollout.episode import Episode
from flash.rollout.observer import Observer
from flash.rollout.record import EpisodeRecord
from flash.types import Outcome


class Ledger(Observer):
    """Counts episodes; invariant 2: admitted = running + ready + ended, at every moment.

    An episode's outcome is that of its first use. Further ones are counted apart, and are never
    more than `most_uses` allows. Those that run or are ready are counted by task set.
    """

    def __init__(self, *, most_uses: int = 1) -> None:
        self._most_uses = most_uses
        self.reused = 0
        self.begun = 0
        self.running_of: Counter[str] = Counter()
        self.ready_of: Counter[str] = Counter()
        self.outcomes: Counter[tuple[Outcome, str]] = Counter()
        self.waste_tokens = 0
        self.waste_env_s = 0.0

    @property
    def running(self) -> int:
        return self.running_of.total()

    @property
    def ready(self) -> int:
        return self.ready_of.total()

    def admitted(self, episode: Episode) -> None:
        self.begun += 1
        self.running_of[episode.task.task_set] += 1

    def played(self, episode: Episode) -> None:
        if episode.trajectory is not None:
            self.running_of[episode.task.task_set] -= 1
            self.ready_of[episode.task.task_set] += 1

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        counted = self.running_of if episode.trajectory is None else self.ready_of
        counted[episode.task.task_set] -= 1
        self.outcomes[record.outcome, record.reason] += 1
        if record.outcome != "trained":
            self.waste_tokens += record.generated_tokens
            stages_s = record.stages_s
            self.waste_env_s += sum(stages_s.get(name, 0.0) for name in ("env", "tools", "agent"))
        self.check()

    def trained_again(self, episode: Episode, uses: int) -> None:
        assert 1 < uses <= self._most_uses, f"{episode.describe()} is trained {uses} times"
        self.reused += 1

    def check(self) -> None:
        """Invariant 2; holds between any two awaits."""
        assert min(self.running_of.values(), default=0) >= 0
        assert min(self.ready_of.values(), default=0) >= 0
        assert self.begun == self.running + self.ready + self.outcomes.total()

    def count(self, outcome: Outcome) -> int:
        """How many episodes ended so, for any reason."""
        return sum(n for (ended, _), n in self.outcomes.items() if ended == outcome)

    def reasons(self) -> dict[str, int]:
        """Every outcome with its reason, as `outcome(reason)`: the count."""
        return {f"{o}({r})" if r else o: n for (o, r), n in sorted(self.outcomes.items())}

    def metrics(self) -> dict[str, Any]:
        """The `episodes/*` and `waste/*` metrics, totals since the start."""
        return {
            "episodes/admitted": self.begun,
            "episodes/running": self.running,
            "episodes/ready": self.ready,
            "episodes/trained": self.count("trained"),
            "episodes/reused": self.reused,
            "episodes/dropped": self.count("dropped"),
            "episodes/failed": self.count("failed"),
            "episodes/cancelled": self.count("cancelled"),
            "waste/tokens": self.waste_tokens,
            "waste/env_s": self.waste_env_s,
        }
