"""The ledger of outcomes: each admitted episode ends in exactly one, and the counts add up."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from flash.rollout.episode import Episode
from flash.types import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRecord:
    """An ended episode, as `episodes.jsonl` keeps it. Times are in seconds."""

    episode: int
    seed: int
    group: int
    attempt: int
    outcome: Outcome
    reason: str
    reward: float | None
    success: bool | None
    turns: int
    prompt_tokens: int
    generated_tokens: int
    version_min: int | None
    version_max: int | None
    trained_at_version: int | None
    admitted_s: float
    ended_s: float
    stages_s: dict[str, float]


class Ledger:
    """Counts episodes; invariant 2: admitted = running + ready + ended, at every moment."""

    def __init__(self) -> None:
        self.admitted = 0
        self.running = 0
        self.ready = 0
        self.ended: Counter[tuple[Outcome, str]] = Counter()
        self.waste_tokens = 0
        self.waste_env_s = 0.0

    def admit(self) -> None:
        self.admitted += 1
        self.running += 1

    def finish(self) -> None:
        """A running episode came to its end and waits for its group and its batch."""
        self.running -= 1
        self.ready += 1

    def end(
        self, episode: Episode, outcome: Outcome, reason: str = "", *, version: int | None = None
    ) -> EpisodeRecord:
        """The episode's one outcome; a second one for the same episode is our bug."""
        assert episode.ended_at is None, f"a second outcome for {episode.describe()}: {outcome}"
        if episode.trajectory is None:
            self.running -= 1
        else:
            self.ready -= 1
            episode.seconds["wait"] = episode.clock() - episode.stage_since
        episode.ended_at = episode.clock()
        self.ended[outcome, reason] += 1
        if outcome != "trained":
            self.waste_tokens += episode.generated_tokens
            self.waste_env_s += episode.seconds.get("env", 0.0) + episode.seconds.get("agent", 0.0)
        self.check()
        trajectory = episode.trajectory
        return EpisodeRecord(
            episode=episode.id,
            seed=episode.task.seed,
            group=episode.group,
            attempt=episode.attempt,
            outcome=outcome,
            reason=reason,
            reward=trajectory.reward if trajectory else None,
            success=trajectory.success if trajectory else None,
            turns=episode.turns,
            prompt_tokens=episode.prompt_tokens,
            generated_tokens=episode.generated_tokens,
            version_min=episode.oldest_version,
            version_max=episode.newest_version,
            trained_at_version=version,
            admitted_s=episode.admitted_at,
            ended_s=episode.ended_at,
            stages_s=dict(episode.seconds),
        )

    def check(self) -> None:
        """Invariant 2; holds between any two awaits."""
        assert self.running >= 0
        assert self.ready >= 0
        assert self.admitted == self.running + self.ready + self.ended.total()

    def count(self, outcome: Outcome) -> int:
        """How many episodes ended so, for any reason."""
        return sum(n for (ended, _), n in self.ended.items() if ended == outcome)

    def reasons(self) -> dict[str, int]:
        """Every outcome with its reason, as `outcome(reason)`: the count."""
        return {f"{o}({r})" if r else o: n for (o, r), n in sorted(self.ended.items())}

    def metrics(self) -> dict[str, Any]:
        """The `episodes/*` and `waste/*` metrics, totals since the start."""
        return {
            "episodes/admitted": self.admitted,
            "episodes/running": self.running,
            "episodes/ready": self.ready,
            "episodes/trained": self.count("trained"),
            "episodes/dropped": self.count("dropped"),
            "episodes/failed": self.count("failed"),
            "episodes/cancelled": self.count("cancelled"),
            "waste/tokens": self.waste_tokens,
            "waste/env_s": self.waste_env_s,
        }
