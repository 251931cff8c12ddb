"""Slots: how much may be under way, and how much of it can still matter. Invariant 3.

A slot is room for one sample that a batch will take. Spare episodes of a group take none, and
redundant groups have slots of their own, so redundancy never makes rollout run further ahead: as
soon as enough groups are complete to fill every batch that α allows, no other is needed.

A group that is trained again holds none. Where that may be, the room is for (1+α) times the fresh
groups that a batch takes at least, F, and for those that the next batch lacks besides. More would
grow too old (Little's law: of N groups under way, of which each batch takes F, one is trained
N/F - 1 versions after it began, on average), and none would be young enough to be trained again.
"""

import math
from collections import deque
from typing import Protocol


class Slots:
    """Counts in groups and samples; knows nothing of single episodes.

    `capacity` is (1+α)·batch: the samples on their way that a batch can take. It is less where
    `reused_groups` of a batch may have been trained before.
    """

    def __init__(
        self,
        *,
        groups_per_batch: int,
        group_size: int,
        alpha: float,
        redundant_groups: int,
        redundant_episodes: int,
        last_version: int | None,
        reused_groups: int = 0,
    ) -> None:
        self._groups_per_batch = groups_per_batch
        self._fresh_groups = groups_per_batch - reused_groups
        self._lacking = reused_groups
        self._group_size = group_size
        self._redundant_groups = redundant_groups
        self.use_alpha(alpha)
        self.capacity = self._room + reused_groups * group_size
        self._last_version = last_version
        self.spares = math.ceil(self.limit / group_size) * redundant_episodes
        self._held: deque[int] = deque()  # versions of batches: handed over, unpublished

    @property
    def most_episodes(self) -> int:
        """So many run or are ready at most, spare ones with them."""
        return self.limit + self.spares

    @property
    def held(self) -> int:
        """Slots of batches that were handed over and whose weights are not published."""
        return self._group_size * self._held_groups()

    def use_alpha(self, alpha: float) -> None:
        """From now on no more begins than this α has room for; `capacity` is still the bound's,
        so that what is under way already is not taken for redundant."""
        # Half a group would keep a place, under on_stale=wait, that a trained one could fill.
        least = self._group_size if self._fresh_groups < self._groups_per_batch else 1
        room = math.floor((1 + alpha) * self._fresh_groups * self._group_size)
        self._room = room - room % least

    @property
    def limit(self) -> int:
        """So many samples are under way at most, those of redundant groups with them."""
        return self._room + (self._lacking + self._redundant_groups) * self._group_size

    @property
    def highest_limit(self) -> int:
        """The limit of the bound's α."""
        return self.capacity + self._redundant_groups * self._group_size

    def expect(self, reusable: int) -> None:
        """So many groups can fill places of the next batch that fresh ones do not."""
        self._lacking = self._groups_per_batch - self._fresh_groups - reusable

    def hold(self, version: int) -> None:
        """A batch for that version was handed over."""
        self._held.append(version)

    def release(self, published: int) -> None:
        """Weights of that version were published."""
        while self._held and self._held[0] < published:
            self._held.popleft()

    def needed(self, *, complete: int, next_version: int) -> int:
        """How many groups more can get into a batch, besides the complete ones."""
        room = self.room(complete=complete)
        if self._last_version is not None:
            left = max(0, self._last_version - next_version)
            room = min(room, left * self._groups_per_batch - complete)
        return room

    def room(self, *, complete: int) -> int:
        """As many, if training went on for ever."""
        return math.ceil(self.capacity / self._group_size) - self._held_groups() - complete

    def wanted(self, *, under_way: int, complete: int, next_version: int) -> int:
        """How many groups more are to begin, redundant ones with them."""
        needed = self.needed(complete=complete, next_version=next_version)
        return needed + self._redundant_groups - (under_way - complete) if needed > 0 else 0

    def _held_groups(self) -> int:
        return self._fresh_groups * len(self._held)


class GroupSchedule(Protocol):
    """When one of the groups that are wanted may begin."""

    def allows(self, wanted: int, *, running: int) -> bool:
        """Whether one may begin now."""
        ...

    def began(self) -> None:
        """One did."""
        ...


class QueueSchedule:
    """A group begins the moment there is room for it."""

    def allows(self, wanted: int, *, running: int) -> bool:
        return True

    def began(self) -> None:
        pass


class BatchSchedule:
    """A batch of groups begins together, and the next when the last episode of it has ended.

    It is how rollout was done before ROLL Flash; to compare with, and for strict batches.
    """

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._left = 0

    def allows(self, wanted: int, *, running: int) -> bool:
        if running == 0:
            self._left = min(wanted, self._groups)
        return self._left > 0

    def began(self) -> None:
        self._left -= 1
