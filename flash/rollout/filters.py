"""Filters of complete groups: what teaches nothing is dropped, and another task takes its place."""

import inspect
import math
from collections.abc import Callable, Sequence

import numpy as np

from flash import registry
from flash.errors import RolloutFailure
from flash.types import Trajectory, by_role

GroupFilter = Callable[[Sequence[Trajectory]], bool]
"""Of the episodes of one group: whether it is dropped. It is called in the event loop."""


def equal_rewards(group: Sequence[Trajectory]) -> bool:
    """All rewards of a role are equal, but for rounding, so that no episode is better than another.

    Yu et al. 2025 (DAPO).
    """
    of_roles = [[each.reward for each in episodes] for episodes in by_role(group).values()]
    return all(
        math.isclose(min(rewards), max(rewards), rel_tol=1e-6, abs_tol=1e-8) for rewards in of_roles
    )


FILTERS: dict[str, GroupFilter] = {"equal_rewards": equal_rewards}


def find_filter(name: str) -> GroupFilter:
    """The filter of that name, or `module:function`. ValueError says what there is."""
    if name in FILTERS:
        return FILTERS[name]
    if ":" not in name:
        raise ValueError(
            f"rollout.filters: {name!r} is not one of {', '.join(sorted(FILTERS))}; name one of "
            f"your own as module:function"
        )
    found: GroupFilter = registry.function(name, "rollout.filters", of="a group's trajectories")
    if inspect.iscoroutinefunction(found):
        raise ValueError(
            f"rollout.filters: {name!r} is a coroutine function, and its answer is not waited for: "
            f"write def"
        )
    return found


class Filters:
    """Judges complete groups of one task set, one filter after another.

    Raises RolloutFailure when more than `at_most` groups are dropped for one batch, or when a
    filter raises or answers neither true nor false.
    """

    def __init__(self, filters: Sequence[GroupFilter], *, at_most: int, task_set: str = "") -> None:
        self._filters = filters
        self._of = f" of task set {task_set}" if task_set else ""
        self._at_most = at_most
        self._dropped = self._kept = 0

    def reason_to_drop(self, group: Sequence[Trajectory]) -> str | None:
        """The outcome's reason; None if the group is kept."""
        for drops in self._filters:
            name = getattr(drops, "__name__", type(drops).__name__)
            try:
                dropped = drops(group)
            except (Exception, SystemExit) as error:  # the boundary to the user's function
                raise RolloutFailure(f"rollout.filters: {name} raised {error!r}") from error
            if not isinstance(dropped, bool | np.bool):
                raise RolloutFailure(
                    f"rollout.filters: {name} returned {dropped!r}: return True for a group to "
                    f"drop, False for one to keep"
                )
            if dropped:
                self._dropped += 1
                if self._dropped > self._at_most:
                    raise RolloutFailure(
                        f"rollout.filters dropped {self._dropped} groups{self._of} and kept "
                        f"{self._kept} since the last batch, the last one by {name}; "
                        f"rollout.max_filtered allows {self._at_most} a batch: take tasks that the "
                        f"policy solves now and then, or raise it"
                    )
                return f"filtered:{name}"
        self._kept += 1
        return None

    def batch_done(self) -> None:
        """A batch was handed over."""
        self._dropped = self._kept = 0
