"""The tasks of a run, in their order, also through a resume."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from flash.rollout.filters import GroupFilter
from flash.seeds import TRAINING_SEEDS, first_task
from flash.types import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSet:
    """Tasks of one kind, of which every batch has so many whole groups.

    `name` becomes the `task_set` of each; `filters` are in the place of the loop's.
    """

    name: str
    tasks: Iterable[Task]
    groups_per_batch: int
    group_size: int
    filters: Sequence[GroupFilter] | None = None

    def __post_init__(self) -> None:
        for field in ("groups_per_batch", "group_size"):
            if (value := getattr(self, field)) < 1:
                raise ValueError(f"{field}={value} of task set {self.name!r} must be at least 1")


class Tasks:
    """The endless tasks of a run, or of one of its task sets: consecutive seeds, from a start that
    the run's seed decides, and the set's name.

    A resumed run begins with those that are to begin anew, and goes on after those that had begun.
    """

    def __init__(
        self,
        seed: int,
        *,
        task_set: str = "",
        dispatched: Iterable[int] = (),
        again: Iterable[int] = (),
    ) -> None:
        """`dispatched` and `again` are seeds of tasks."""
        first = first_task(seed, task_set)
        self._task_set = task_set
        begun = [(task - first) % TRAINING_SEEDS + 1 for task in dispatched]
        self._again = deque(again)
        self._next = itertools.count(first + max(begun, default=0))

    def __iter__(self) -> Iterator[Task]:
        while True:
            if self._again:
                yield Task(self._again.popleft(), task_set=self._task_set)
            else:
                yield Task(next(self._next) % TRAINING_SEEDS, task_set=self._task_set)
