"""What each task set has of every batch, and the room for it. Invariant 3.

                      ┌─ tasks → admission → slots → filters ─┐
    one batch  ◄──────┼─ tasks → admission → slots → filters ─┤   each set's groups, a fixed number
                      └─ …                                    ┘

A batch has of each set a fixed number of whole groups, so its size and its mixture are always the
same. Each set has slots for (1+α) times its own samples of a batch, together (1+α)·batch: a set of
long episodes is never crowded out by another. Without task sets there is one share, the whole.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

from flash.rollout.admission import Admission
from flash.rollout.config import RolloutSettings
from flash.rollout.filters import Filters, GroupFilter
from flash.rollout.groups import Counts, Group, Groups
from flash.rollout.ledger import Ledger
from flash.rollout.restored import DueEpisode, OpenGroup
from flash.rollout.reuse import Reuse, metrics_of_reused
from flash.rollout.slots import BatchSchedule, QueueSchedule, Slots
from flash.rollout.tasks import TaskSet
from flash.types import Task


class Share:
    """One task set's part of every batch, with slots, admission, filters and uses of its own."""

    def __init__(
        self,
        task_set: TaskSet,
        groups: Groups,
        *,
        settings: RolloutSettings,
        filters: Sequence[GroupFilter],
        alpha: float,
        last_version: int | None,
        ledger: Ledger,
    ) -> None:
        self.name = task_set.name
        self.group_size = task_set.group_size
        self.groups_per_batch = task_set.groups_per_batch
        self.filters = Filters(
            filters if task_set.filters is None else task_set.filters,
            at_most=settings.max_filtered * self.groups_per_batch,
            task_set=self.name,
        )
        self.reuse = Reuse(settings.reuse, alpha=alpha, groups_per_batch=self.groups_per_batch)
        self.slots = Slots(
            groups_per_batch=self.groups_per_batch,
            group_size=self.group_size,
            alpha=alpha,
            reused_groups=self.reuse.most,
            redundant_groups=settings.redundant_groups,
            redundant_episodes=settings.redundant_episodes,
            last_version=last_version,
        )
        self.admission = Admission(
            task_set.tasks,
            groups,
            task_set=self.name,
            slots=self.slots,
            schedule=(
                QueueSchedule()
                if settings.schedule == "queue"
                else BatchSchedule(self.groups_per_batch + settings.redundant_groups)
            ),
            ledger=ledger,
            group_size=self.group_size,
            episodes=self.group_size + settings.redundant_episodes,
        )
        self.to_restore: deque[OpenGroup] = deque()
        self._groups = groups

    @property
    def counts(self) -> Counts:
        """Of its groups on their way."""
        return self._groups.counts(self.name)

    @property
    def can_restore(self) -> bool:
        """Whether there is a group to go on with, and room for all of it; for the first there is,
        if nothing else is under way."""
        more = self.group_size * (self.counts.groups + 1)
        held = self.slots.held
        return bool(self.to_restore) and (
            not (self.counts.groups or held) or held + more <= self.slots.limit
        )

    def needed(self, version: int) -> int:
        """Groups that a batch for that version takes, and that were not trained before."""
        return self.groups_per_batch - self.reuse.available(version)


class Shares:
    """Those of all task sets. ValueError for two of one name, or none at all."""

    def __init__(
        self,
        task_sets: Sequence[TaskSet],
        groups: Groups,
        *,
        settings: RolloutSettings,
        filters: Sequence[GroupFilter],
        alpha: float,
        last_version: int | None,
        ledger: Ledger,
    ) -> None:
        names = [task_set.name for task_set in task_sets]
        if len({*names}) < len(names) or not names:
            raise ValueError(f"task_sets={names}: give at least one, each with a name of its own")
        self._shares = {
            task_set.name: Share(
                task_set,
                groups,
                settings=settings,
                filters=filters,
                alpha=alpha,
                last_version=last_version,
                ledger=ledger,
            )
            for task_set in task_sets
        }
        self.groups_per_batch = sum(share.groups_per_batch for share in self)
        self.batch_size = sum(share.groups_per_batch * share.group_size for share in self)

    def __iter__(self) -> Iterator[Share]:
        return iter(self._shares.values())

    def of(self, task: Task) -> Share:
        """That of the task's set."""
        return self._shares[task.task_set]

    # ── admission ────────────────────────────────────────────────────────────────────────────

    @property
    def due(self) -> int:
        """Episodes that groups under way still lack."""
        return sum(len(share.admission) for share in self)

    def next_start(self, next_version: int) -> tuple[Group, DueEpisode] | None:
        """The group of an episode to begin now, and which; None if there is no room or task.

        Of the set that has least under way, for its share of a batch.
        """
        in_turn = sorted(self, key=lambda share: share.counts.groups / share.groups_per_batch)
        starts = (share.admission.next_start(next_version) for share in in_turn)
        return next((start for start in starts if start is not None), None)

    # ── slots ────────────────────────────────────────────────────────────────────────────────

    @property
    def most_episodes(self) -> int:
        """So many run or are ready at most, spare ones with them."""
        return sum(share.slots.most_episodes for share in self)

    @property
    def held(self) -> int:
        """Slots of batches that were handed over and whose weights are not published."""
        return sum(share.slots.held for share in self)

    def use_alpha(self, alpha: float) -> None:
        for share in self:
            share.slots.use_alpha(alpha)

    def hold(self, version: int) -> None:
        """A batch for that version was handed over."""
        for share in self:
            share.slots.hold(version)

    def release(self, published: int) -> None:
        """Weights of that version were published."""
        for share in self:
            share.slots.release(published)

    def expect_reuse(self, version: int) -> None:
        """What of the next batch, for that version, groups can fill that were trained before."""
        for share in self:
            share.slots.expect(share.reuse.available(version))

    # ── batches ──────────────────────────────────────────────────────────────────────────────

    def trained(self, groups: Sequence[Group], *, version: int) -> None:
        """A batch for that version is made of these."""
        for share in self:
            of_share = [group for group in groups if group.task.task_set == share.name]
            share.reuse.trained(of_share, version=version)
            share.filters.batch_done()

    def reuse_metrics(self, again: Sequence[Group], *, version: int) -> dict[str, Any]:
        """Of a batch with these groups that were trained before; none if that can't be."""
        if not any(share.reuse.most for share in self):
            return {}
        return metrics_of_reused(again, version=version, groups_per_batch=self.groups_per_batch)
