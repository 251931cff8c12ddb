"""The groups on their way into a batch, and what they add up to."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from flash.rollout.episode import Episode
from flash.types import Task

_oldest = attrgetter("oldest")


@dataclass(slots=True, eq=False)
class Group:
    """The episodes of one task; complete when `size` of them are ready, however many began."""

    id: int
    task: Task
    size: int
    members: dict[int, Episode] = field(default_factory=dict)
    ready: int = 0
    due: int = 0  # episodes still to begin
    regenerations: int = 0

    @property
    def complete(self) -> bool:
        return self.ready >= self.size

    @property
    def spares(self) -> int:
        """Episodes beyond what the group needs, which take no slots."""
        return max(0, len(self.members) - self.size)

    @property
    def oldest(self) -> float:
        """The version of the oldest token so far; infinite if there is none."""
        return min(map(_oldest, self.members.values()), default=math.inf)

    def older_than(self, version: float) -> list[Episode]:
        """The members of which a token is older."""
        if self.oldest >= version:  # as most of thousands are
            return []
        return [member for member in self.members.values() if member.oldest < version]


@dataclass(slots=True)
class Counts:
    """Of the groups of one task set, kept as their members change."""

    groups: int = 0
    complete: int = 0
    spares: int = 0


class Groups:
    """In the order of their tasks, those of all task sets.

    `changes` counts what may make another choice of groups possible: one is complete, one is on its
    way no longer, one has lost a member. See `wait_for`.
    """

    def __init__(self, first_id: int = 0) -> None:
        self.changes = 0
        self._awaited: set[Group] = set()
        self._awaited_changes = 0
        self._groups: dict[int, Group] = {}
        self._counts: dict[str, Counts] = defaultdict(Counts)
        self._next_id = first_id

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def __contains__(self, group: Group) -> bool:
        return group.id in self._groups

    def get(self, group_id: int) -> Group | None:
        return self._groups.get(group_id)

    def counts(self, task_set: str) -> Counts:
        """Of that task set; read them when you need them."""
        return self._counts[task_set]

    def wait_for(self, groups: Iterable[Group], changes: int) -> None:
        """Other groups do not count, nor do these before there are so many changes of them; all
        count, if there are none."""
        self._awaited = {*groups}
        self._awaited_changes = changes

    def begin(self, task: Task, *, size: int, episodes: int) -> Group:
        """A new group, of which so many episodes are to begin."""
        group = self._hold(Group(self._next_id, task, size, due=episodes))
        self._next_id += 1
        return group

    def restore(self, group_id: int, task: Task, *, size: int) -> Group:
        """A group that had begun when the run ended."""
        return self._hold(Group(group_id, task, size))

    def _hold(self, group: Group) -> Group:
        self._groups[group.id] = group
        self._counts[group.task.task_set].groups += 1
        return group

    def close(self, group: Group) -> None:
        """It is on its way no longer; its members are as they were."""
        del self._groups[group.id]
        self._counts[group.task.task_set].groups -= 1
        self._count(group, -1)
        self._changed(group)

    def add(self, group: Group, episode: Episode) -> None:
        self._count(group, -1)
        group.members[episode.id] = episode
        self._count(group, +1)

    def remove(self, group: Group, episode: Episode) -> None:
        self._count(group, -1)
        del group.members[episode.id]
        group.ready -= episode.ready
        self._count(group, +1)
        self._changed(group)

    def finish(self, group: Group, episode: Episode) -> None:
        """This member of it is ready."""
        self._count(group, -1)
        episode.ready = True
        group.ready += 1
        self._count(group, +1)
        if group.complete:
            self._changed(group)

    def _changed(self, group: Group) -> None:
        if group in self._awaited:
            self._awaited_changes -= 1
        if not self._awaited or (group in self._awaited and self._awaited_changes <= 0):
            self.changes += 1

    def _count(self, group: Group, sign: int) -> None:
        counts = self._counts[group.task.task_set]
        counts.complete += sign * group.complete
        counts.spares += sign * group.spares
