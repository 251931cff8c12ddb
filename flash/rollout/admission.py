"""Which episode begins next, and whether there is room for it. Invariant 3."""

from collections import deque
from collections.abc import Iterable

from flash.rollout.groups import Group, Groups
from flash.rollout.ledger import Ledger
from flash.rollout.slots import BatchSchedule, QueueSchedule, Slots
from flash.types import Task


class Starts:
    """The starts owed to groups under way, and after them those of new groups.

    Args:
        tasks: where new groups come from, in order; may be endless.
        group_size, episodes: a group needs so many, and so many begin.
    """

    def __init__(
        self,
        tasks: Iterable[Task],
        groups: Groups,
        *,
        slots: Slots,
        schedule: QueueSchedule | BatchSchedule,
        ledger: Ledger,
        group_size: int,
        episodes: int,
    ) -> None:
        self.exhausted = False  # the tasks have ended
        self._tasks = iter(tasks)
        self._groups = groups
        self._slots = slots
        self._schedule = schedule
        self._ledger = ledger
        self._group_size = group_size
        self._episodes = episodes
        self._owed: deque[tuple[Group, int]] = deque()  # with the attempt

    def __len__(self) -> int:
        return len(self._owed)

    def owe(self, group: Group, attempt: int) -> None:
        """One more episode of this group, before all others."""
        group.owed += 1
        self._owed.appendleft((group, attempt))

    def cancel(self, group: Group) -> None:
        """No more episodes of this group."""
        if group.owed:
            self._owed = deque(start for start in self._owed if start[0] is not group)
            group.owed = 0

    def next_start(self, next_version: int) -> tuple[Group, int] | None:
        """The group and the attempt of an episode to begin now; None if there is no room or task.

        `next_version` is the one at which the next batch will be trained.
        """
        if self._ledger.running + self._ledger.ready >= self._slots.most_episodes:
            return None
        while self._owed:
            group, attempt = self._owed[0]
            if group in self._groups:
                if len(group.members) < group.size and not self._has_slot():
                    return None
                self._owed.popleft()
                group.owed -= 1
                return group, attempt
            self._owed.popleft()
        if not self._has_slot() or not self._may_begin(next_version):
            return None
        task = next(self._tasks, None)
        if task is None:
            self.exhausted = True
            return None
        group = self._groups.begin(task, size=self._group_size, episodes=self._episodes)
        self._schedule.began()
        self._owed.extend([(group, 1)] * self._episodes)
        return self.next_start(next_version)

    def _has_slot(self) -> bool:
        under_way = self._ledger.running + self._ledger.ready - self._groups.spares
        return under_way + self._slots.held < self._slots.limit

    def _may_begin(self, next_version: int) -> bool:
        wanted = self._slots.wanted(
            under_way=len(self._groups),
            complete=self._groups.complete,
            next_version=next_version,
        )
        return wanted > 0 and self._schedule.allows(wanted, running=self._ledger.running)
