"""Which episode of a task set begins next, and whether there is room for it. Invariant 3."""

from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from flash.rollout.groups import Group, Groups
from flash.rollout.ledger import Ledger
from flash.rollout.restored import DueEpisode
from flash.rollout.slots import GroupSchedule, Slots
from flash.types import Task


class Admission:
    """Decides what begins next: the episodes that groups under way still lack, then new groups.

    Args:
        tasks: where new groups come from, in order; may be endless.
        task_set: whose tasks these are.
        group_size, episodes: a group needs so many, and so many begin.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        groups: Groups,
        *,
        task_set: str,
        slots: Slots,
        schedule: GroupSchedule,
        ledger: Ledger,
        group_size: int,
        episodes: int,
    ) -> None:
        self.exhausted = False  # the tasks have ended
        self.new_groups = True  # whether they may begin
        self._tasks = iter(tasks)
        self._task_set = task_set
        self._groups = groups
        self._slots = slots
        self._schedule = schedule
        self._ledger = ledger
        self._group_size = group_size
        self._episodes = episodes
        self._again: deque[tuple[Group, DueEpisode]] = deque()  # in the places of others
        self._due: deque[tuple[Group, DueEpisode]] = deque()

    def __len__(self) -> int:
        """Episodes that groups under way still lack."""
        return len(self._again) + len(self._due)

    def start_again(self, group: Group, due: DueEpisode) -> None:
        """One more episode of this group, before all others: a group that has begun comes to its
        end, also where α is so low by now that it would not begin."""
        group.due += 1
        self._again.appendleft((group, due))

    def restore(self, group: Group, due: Iterable[DueEpisode]) -> None:
        """These episodes of a group, after those that are due already."""
        for episode in due:
            group.due += 1
            self._due.append((group, episode))

    def cancel(self, group: Group) -> None:
        """No more episodes of this group."""
        if group.due:
            self._again = deque(start for start in self._again if start[0] is not group)
            self._due = deque(start for start in self._due if start[0] is not group)
            group.due = 0

    def next_start(self, next_version: int) -> tuple[Group, DueEpisode] | None:
        """The group of an episode to begin now, and which; None if there is no room or task.

        `next_version` is the one at which the next batch will be trained.
        """
        for due, limit in (
            (self._again, self._slots.highest_limit),
            (self._due, self._slots.limit),
        ):
            while due:
                group = due[0][0]
                if group in self._groups:
                    if not self._has_slot(limit, spare=len(group.members) >= group.size):
                        return None
                    group.due -= 1
                    return due.popleft()
                due.popleft()
        if not (
            self.new_groups and self._has_slot(self._slots.limit) and self._may_begin(next_version)
        ):
            return None
        task = next(self._tasks, None)
        if task is None:
            self.exhausted = True
            return None
        if task.task_set != self._task_set:
            task = replace(task, task_set=self._task_set)
        group = self._groups.begin(task, size=self._group_size, episodes=self._episodes)
        self._schedule.began()
        self._due.extend([(group, DueEpisode())] * self._episodes)
        return self.next_start(next_version)

    def _has_slot(self, limit: int, *, spare: bool = False) -> bool:
        """Whether there is room for another episode, with so many slots in all."""
        under_way = self._running + self._ledger.ready_of[self._task_set] + self._slots.held
        if under_way >= limit + self._slots.spares:
            return False
        return spare or under_way - self._groups.counts(self._task_set).spares < limit

    def _may_begin(self, next_version: int) -> bool:
        counts = self._groups.counts(self._task_set)
        wanted = self._slots.wanted(
            under_way=counts.groups,
            complete=counts.complete,
            next_version=next_version,
        )
        return wanted > 0 and self._schedule.allows(wanted, running=self._running)

    @property
    def _running(self) -> int:
        return self._ledger.running_of[self._task_set]
