"""Which groups make a batch, and which episodes are too old for it. Invariant 1."""

from collections.abc import Sequence

from flash.rollout.episode import Episode
from flash.rollout.groups import Group


def stale(group: Group, *, version: int, alpha: float) -> list[Episode]:
    """The members of which a token would be older than α in a batch for this version."""
    return [
        member
        for member in group.members.values()
        if member.oldest_version is not None and version - member.oldest_version > alpha
    ]


def choose(
    groups: Sequence[Group], wanted: int, *, version: int, alpha: float, wait: bool
) -> list[Group]:
    """The complete ones of `groups` for a batch for this version, oldest first; `wanted` at most.

    With `wait`, groups that would be too old for the batch after this one have their places kept,
    complete or not. More than a batch of them exists only if α is no integer; those left over are
    regenerated.
    """
    due: list[Group] = []
    if wait:
        due = [group for group in groups if version + 1 - group.oldest_version > alpha][:wanted]
    others = [group for group in groups if group.complete and group not in due]
    return [group for group in due if group.complete] + others[: wanted - len(due)]
