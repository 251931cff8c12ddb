"""Groups that were trained, and may be once more where a batch would wait for others.

    hand-over ─► Reuse ──by priority, while within α and not used up──► a later batch

A group is in it no longer than α versions, so it never holds more than 1+α batches.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from flash import registry
from flash.errors import RolloutFailure
from flash.rollout.batching import Ages, trajectories
from flash.rollout.config import AgeDecay, AnyPriority, LinearDecay, ReuseConfig
from flash.rollout.groups import Group
from flash.types import Trajectory


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedGroup:
    """What a priority knows of a group that may be trained again.

    `version` is that of its oldest token, `age` how old that will be in the batch to come, and
    `uses` how many batches the group was in.
    """

    trajectories: Sequence[Trajectory]
    version: int
    age: int
    uses: int


Priority = Callable[[TrainedGroup], float]
"""The higher, the sooner a group is trained again. It is called in the event loop."""


def linear_decay(group: TrainedGroup, *, decay: float) -> float:
    """The version, less for each use. Trinity-RFT, LinearDecayPriority."""
    return group.version - decay * group.uses


def age_decay(group: TrainedGroup, *, tau: float) -> float:
    """The deviation of the group's rewards, times exp(-age/τ). Ma et al. 2026 (FreshPER), whose
    priorities are of single samples."""
    return float(np.std([t.reward for t in group.trajectories])) * math.exp(-group.age / tau)


def find_priority(settings: AnyPriority) -> Priority:
    """The function that these settings stand for."""
    if isinstance(settings, LinearDecay):
        return partial(linear_decay, decay=settings.decay)
    if isinstance(settings, AgeDecay):
        return partial(age_decay, tau=settings.tau)
    found: Priority = registry.function(settings.run, "rollout.reuse.priority.run")
    return partial(_of_users, found, settings.run)


def _of_users(priority: Priority, name: str, group: TrainedGroup) -> float:
    try:
        found = priority(group)
    except (Exception, SystemExit) as error:  # the boundary to the user's function
        raise RolloutFailure(f"rollout.reuse.priority: {name} raised {error!r}") from error
    if not isinstance(found, int | float | np.number) or not math.isfinite(found):
        raise RolloutFailure(
            f"rollout.reuse.priority: {name} returned {found!r}: return a number, higher for what "
            f"is to be trained again sooner"
        )
    return float(found)


def metrics_of_reused(
    again: Sequence[Group], *, version: int, groups_per_batch: int
) -> dict[str, Any]:
    """The `reuse/*` metrics of a batch for that version with these groups."""
    ages = Ages(version)
    ages.add(again)
    return {"reuse/share": len(again) / groups_per_batch, "reuse/age_mean": ages.mean}


class Reuse:
    """Keeps what was trained for as long as it may be trained again.

    Raises ValueError if nothing ever could be, and RolloutFailure for a priority that fails.
    """

    def __init__(self, settings: ReuseConfig, *, alpha: float, groups_per_batch: int) -> None:
        settings.check(alpha=alpha, groups_per_batch=groups_per_batch)
        self.most = settings.groups(groups_per_batch)
        self._most_uses = settings.uses
        self._alpha = alpha
        self._priority = find_priority(settings.priority)
        self._kept: dict[Group, int] = {}  # how many batches each was in
        self._of_version: Counter[float] = Counter()  # how many, by their oldest token's

    def __len__(self) -> int:
        return len(self._kept)

    def uses(self, group: Group) -> int:
        """Batches that a group which is kept was in."""
        return self._kept[group]

    def available(self, version: int) -> int:
        """How many places of a batch for that version can be filled."""
        counts = self._of_version.items()
        return min(self.most, sum(count for v, count in counts if self._is_fresh(v, version)))

    def choose(self, wanted: int, *, version: int) -> list[Group]:
        """So many for a batch for that version, the highest priorities first; none if there are
        fewer."""
        fresh = [g for g in self._kept if self._is_fresh(g.oldest, version)]
        if not 0 < wanted <= min(self.most, len(fresh)):
            return []
        # Of equal ones the newest: what is chosen never depends on the order in which they came.
        fresh.sort(key=lambda group: (-self._priority(self._told(group, version)), -group.id))
        return fresh[:wanted]

    def trained(self, groups: Iterable[Group], *, version: int) -> None:
        """A batch for that version is made of these; forgets what can be in no later one."""
        if not self.most:
            return
        for group in groups:
            self.keep(group, self._kept.get(group, 0) + 1)
        for group, uses in list(self._kept.items()):
            oldest = group.oldest
            if uses >= self._most_uses or not self._is_fresh(oldest, version + 1):
                del self._kept[group]
                self._of_version -= Counter([oldest])  # which forgets a version without any

    def keep(self, group: Group, uses: int) -> None:
        """It was in so many batches."""
        if group not in self._kept:
            self._of_version[group.oldest] += 1
        self._kept[group] = uses

    def _is_fresh(self, oldest: float, version: int) -> bool:
        return version - oldest <= self._alpha

    def _told(self, group: Group, version: int) -> TrainedGroup:
        oldest = version if group.oldest == math.inf else int(group.oldest)
        return TrainedGroup(
            trajectories=trajectories(group),
            version=oldest,
            age=version - oldest,
            uses=self._kept[group],
        )
