"""The tasks of a run, in their order, also through a resume."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator

from flash.seeds import TRAINING_SEEDS, first_task
from flash.types import Task


class Tasks:
    """The endless tasks of a run: consecutive seeds, from a start that the run's seed decides.

    A resumed run begins with those that are to begin anew, and goes on after those that had begun.
    """

    def __init__(
        self, seed: int, *, dispatched: Iterable[int] = (), again: Iterable[int] = ()
    ) -> None:
        """`dispatched` and `again` are seeds of tasks."""
        first = first_task(seed)
        begun = [(task - first) % TRAINING_SEEDS + 1 for task in dispatched]
        self._again = deque(again)
        self._next = itertools.count(first + max(begun, default=0))

    def __iter__(self) -> Iterator[Task]:
        while True:
            if self._again:
                yield Task(self._again.popleft())
            else:
                yield Task(next(self._next) % TRAINING_SEEDS)
