"""How a policy did on held-out tasks."""

from dataclasses import dataclass


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

    def metrics(self) -> dict[str, float]:
        """The `eval/*` metrics."""
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
        )
