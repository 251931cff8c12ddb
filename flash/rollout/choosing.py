"""Which groups the next batch takes.

complete groups, young enough ──┬─► the oldest ones ─────────────────────┐
on_stale=wait: late ones ───────┘   but for the places of those          ├──► batch
groups that were trained before ──► in what places are left and not kept ┘
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from flash.rollout.groups import Group, Groups
from flash.rollout.shares import Shares


class Chooser:
    """Chooses the groups of the batch for a version, and knows when that can be of use.

    `waits`: whether places are kept for groups that would grow too old. See `choose_groups`.
    """

    def __init__(self, groups: Groups, shares: Shares, *, alpha: float, waits: bool) -> None:
        self._groups = groups
        self._shares = shares
        self._alpha = alpha
        self._waits = waits
        self._vain: tuple[int, ...] = ()

    def may_be_enough(
        self, at_least: int, taken: Collection[Group], version: int, published: int
    ) -> bool:
        """Whether so many groups may be chosen, or all that the batch has not yet, with those that
        were trained before.

        `taken` are those that it has; `published` is the version that workers have.
        """
        wanted = self._wanted(taken)
        fresh = again = 0
        for share in self._shares:
            of_set = share.groups_per_batch - wanted[share.name]
            complete = min(wanted[share.name], share.counts.complete - of_set)
            fresh += complete
            again += min(wanted[share.name] - complete, share.reuse.available(version))
        enough = fresh >= at_least or fresh + again >= wanted.total()
        return enough and self._vain != self._state(at_least, version, published)

    def choose(
        self, at_least: int, taken: Collection[Group], version: int, published: int
    ) -> tuple[list[Group], list[Group]]:
        """Complete groups, as many as the batch has room for; and, if these are not enough and
        that makes it whole, some that were trained before. None if there are fewer than `at_least`.
        """
        wanted = self._wanted(taken)
        left = [group for group in self._groups if group not in taken]
        fresh: list[Group] = []
        again: list[Group] = []
        awaited: list[Group] = []
        kept = 0
        for share in self._shares:
            choice = choose_groups(
                [group for group in left if group.task.task_set == share.name],
                wanted[share.name],
                version=version,
                alpha=self._alpha,
                wait_for=(share.groups_per_batch, published) if self._waits else None,
            )
            fresh += choice.groups
            awaited += choice.awaited
            kept += choice.kept
            if not choice.kept:
                lacking = wanted[share.name] - len(choice.groups)
                again += share.reuse.choose(lacking, version=version)
        if len(fresh) + len(again) < wanted.total():
            again = []
        if len(fresh) + len(again) < at_least:
            self._vain = self._state(at_least, version, published)
            # Others can't help where the places that are kept alone are too many; and of those that
            # they are kept for, each that changes leaves one less.
            too_many = kept - (wanted.total() - at_least)
            self._groups.wait_for(awaited if too_many > 0 else (), too_many)
            return [], []
        return sorted(fresh, key=lambda group: group.id), again

    def _wanted(self, taken: Collection[Group]) -> Counter[str]:
        """Groups of each task set that the batch has not yet."""
        wanted = Counter({share.name: share.groups_per_batch for share in self._shares})
        wanted.subtract(group.task.task_set for group in taken)
        return wanted

    def _state(self, at_least: int, version: int, published: int) -> tuple[int, ...]:
        """What there is to choose from: while it is the same, so is what is chosen."""
        return at_least, self._groups.changes, version, published


@dataclass(frozen=True, slots=True)
class _Choice:
    """Groups of one task set for a batch, oldest first; and how many of its other places are kept.

    `awaited` are the groups that those are kept for: while they stay as they are, so do the places.
    """

    groups: list[Group]
    kept: int
    awaited: list[Group]


def choose_groups(
    groups: Sequence[Group],
    wanted: int,
    *,
    version: int,
    alpha: float,
    wait_for: tuple[int, int] | None = None,
) -> _Choice:
    """Of the complete ones of `groups` for a batch for this version; `wanted` at most.

    With `wait_for`, the groups of a batch and the version that is published now, nobody is
    overtaken who would find no place later: of those that must be in one of the next h batches,
    all but so many as h-1 batches can take have a place in this one, complete or not. That is
    always possible, but for an α that is no integer, and for redundant groups.
    """
    chosen: set[Group] = set()
    awaited: list[Group] = []
    places = 0  # given, or kept for groups that are not complete
    of_batch, published = wait_for or (0, 0)
    last = [_last(group, alpha, published) for group in groups] if wait_for else []
    for later in range(math.floor(alpha) + 1) if wait_for else ():
        due = [g for g, until in zip(groups, last, strict=True) if until <= version + later]
        needed = min(len(due) - later * of_batch, wanted) - places
        if needed > 0:
            ready = [group for group in due if group.complete and group not in chosen]
            chosen.update(ready[:needed])
            places += needed
            if needed > len(ready):
                awaited = [group for group in due if not group.complete]
    kept = places - len(chosen)
    others = [group for group in groups if group.complete and group not in chosen]
    chosen.update(others[: wanted - places])
    return _Choice([group for group in groups if group in chosen], kept, awaited)


def _last(group: Group, alpha: float, published: int) -> int:
    """The last version that it can be trained for. Who has not begun to sample may do so now."""
    oldest = group.oldest
    return math.floor((published if oldest == math.inf else oldest) + alpha)
