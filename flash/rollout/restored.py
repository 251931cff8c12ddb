"""What a run goes on with that was under way when it ended; read from its log."""

from collections.abc import Sequence
from dataclasses import dataclass

from flash.rollout.history import History, Sampled
from flash.types import Batch, Task, Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyEpisode:
    """One that had come to its end, and was in no batch yet."""

    episode: int
    attempt: int
    trajectory: Trajectory
    prompt_tokens: int
    generated_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DueEpisode:
    """One that is to begin; where it was under way before as `episode`, which that `start` of the
    run began, with what had been said."""

    attempt: int = 1
    episode: int | None = None
    start: int = 0
    history: History = ()

    @property
    def oldest_version(self) -> int | None:
        """Of its sampled tokens; None if there are none."""
        versions = [
            min(step.completion.versions)
            for step in self.history
            if isinstance(step, Sampled) and step.completion.versions
        ]
        return min(versions, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenGroup:
    """A group that was on its way into a batch; `ready` as they came to their ends."""

    group: int
    task: Task
    ready: Sequence[ReadyEpisode] = ()
    due: Sequence[DueEpisode] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedGroup:
    """A group that was in so many batches, and may be in others."""

    group: int
    task: Task
    episodes: Sequence[ReadyEpisode]
    uses: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored:
    """Where a loop goes on.

    `batches` were handed over, and are to be trained still, in this order: each in its parts; they
    count as uses of `reusable`. `first_ids` are of an episode and of a group, from which new ones
    are counted.
    """

    groups: Sequence[OpenGroup] = ()
    reusable: Sequence[UsedGroup] = ()
    batches: Sequence[Batch] = ()
    first_ids: tuple[int, int] = (0, 0)

    @property
    def cut_off(self) -> dict[int, int]:
        """Episodes that were under way, and are due: the start of the run that began each."""
        due = (each for group in self.groups for each in group.due)
        return {each.episode: each.start for each in due if each.episode is not None}
