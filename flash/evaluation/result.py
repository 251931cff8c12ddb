"""How a policy did on held-out tasks."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How it did on one task set."""

    success_rate: float
    reward_mean: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """How the policy did. Means are over the episodes that came to their ends."""

    success_rate: float
    reward_mean: float
    turns_mean: float
    episodes: int
    failed: int
    time_s: float
    versions: tuple[int, ...]  # whose weights sampled it: one, unless some were published meanwhile
    paused: bool = True  # whether rollout waited for it
    task_sets: Mapping[str, Score] = field(default_factory=dict)  # by name, if there are some

    def metrics(self) -> dict[str, float]:
        """The `eval/*` metrics; those of a task set end in its name."""
        scores = self.task_sets.items()
        versions = {"eval/version": self.versions[0]} if self.versions else {}
        took = {"eval/time_s": self.time_s} if self.paused else {}
        return (
            versions
            | took
            | {
                "eval/success_rate": self.success_rate,
                "eval/reward_mean": self.reward_mean,
                "eval/turns_mean": self.turns_mean,
                "eval/episodes": self.episodes,
                "eval/failed": self.failed,
            }
            | {f"eval/success_rate/{of}": score.success_rate for of, score in scores}
            | {f"eval/reward_mean/{of}": score.reward_mean for of, score in scores}
        )
