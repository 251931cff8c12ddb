"""The tasks of a run, in their order, also through a resume."""

import itertools
from collections.abc import Iterable, Iterator

from flash.seeds import TRAINING_SEEDS, first_task
from flash.types import Task


class Tasks:
    """The endless tasks of a run: consecutive seeds, from a start that the run's seed decides.

    A resumed run begins with those that had begun and were not trained.
    """

    def __init__(self, seed: int) -> None:
        self._first = first_task(seed)
        self._next = itertools.count(self._first)
        self.left: list[int] = []  # seeds, of those that a run before had begun
        self.given = 0

    def __iter__(self) -> Iterator[Task]:
        while True:
            if self.left:
                yield Task(self.left.pop(0))
            else:
                self.given += 1
                yield Task(next(self._next) % TRAINING_SEEDS)

    def go_on(self, *, given: int, unfinished: Iterable[int]) -> None:
        """From where so many had been given, and these of them, by seed, were not trained."""
        self.given, self.left = given, list(unfinished)
        self._next = itertools.count(self._first + self.given)
