"""What is kept of an episode that has ended."""

from dataclasses import dataclass
from typing import Any

from flash.rollout.episode import Episode
from flash.types import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class EpisodeRecord:
    """An ended episode, as `episodes.jsonl` keeps it. Times are in seconds."""

    episode: int
    task_set: str = ""
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

    @classmethod
    def of(
        cls, episode: Episode, outcome: Outcome, reason: str = "", *, version: int | None = None
    ) -> "EpisodeRecord":
        """Ends the episode, with its one outcome; `version` is the one it is trained at."""
        assert episode.ended_at is None, f"a second outcome for {episode.describe()}: {outcome}"
        ended_at = episode.end()
        trajectory = episode.trajectory
        return cls(
            episode=episode.id,
            task_set=episode.task.task_set,
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
            ended_s=ended_at,
            stages_s=dict(episode.seconds),
        )

    @classmethod
    def of_row(cls, row: Any) -> "EpisodeRecord":
        """That of an episode in the log (`flash.log.schema.EPISODES`), whose times are dates."""
        return cls(
            episode=row.episode,
            task_set=row.task_set,
            seed=row.seed,
            group=row.group,
            attempt=row.attempt,
            outcome=row.outcome,
            reason=row.reason or "",
            reward=row.reward,
            success=row.success,
            turns=row.turns or 0,
            prompt_tokens=row.prompt_tokens or 0,
            generated_tokens=row.generated_tokens or 0,
            version_min=row.version_min,
            version_max=row.version_max,
            trained_at_version=row.trained_at_version,
            admitted_s=row.admitted_at,
            ended_s=row.ended_at,
            stages_s=row.stages_s or {},
        )
