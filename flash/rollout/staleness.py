"""Which groups make a batch, and which episodes are too old for it. Invariant 1."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flash.rollout.episode import Episode
from flash.rollout.groups import Group


def stale_episodes(group: Group, *, version: int, alpha: float) -> list[Episode]:
    """The members of which a token would be older than α in a batch for this version."""
    allowed = version - alpha
    return [
        member
        for member in group.members.values()
        if (oldest := member.oldest_version) is not None and oldest < allowed
    ]


@dataclass(frozen=True, slots=True)
class Choice:
    """Groups of a batch, oldest first; and how many of its other places are kept.

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
) -> Choice:
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
    return Choice([group for group in groups if group in chosen], kept, awaited)


def _last(group: Group, alpha: float, published: int) -> int:
    """The last version that it can be trained for. Who has not begun to sample may do so now."""
    oldest = group.oldest_version
    return math.floor((published if oldest is None else oldest) + alpha)
