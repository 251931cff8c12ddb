"""The tasks of a run, in their order, also through a checkpoint."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from flash.seeds import TRAINING_SEEDS, first_task
from flash.types import Task

TASKS_FILE = "tasks.json"  # of a checkpoint, and saved last of its files


class Tasks:
    """The endless tasks of a run: consecutive seeds, from a start that the run's seed decides.

    A checkpoint keeps which ones were begun and not trained; a resumed run begins with those.
    """

    def __init__(self, seed: int) -> None:
        self._first = first_task(seed)
        self._next = itertools.count(self._first)
        self._unfinished: list[int] = []
        self.given = 0

    def __iter__(self) -> Iterator[Task]:
        while True:
            if self._unfinished:
                yield Task(self._unfinished.pop(0))
            else:
                self.given += 1
                yield Task(next(self._next) % TRAINING_SEEDS)

    def save(self, checkpoint: Path, unfinished: list[Task]) -> None:
        seeds = [task.seed for task in unfinished] + self._unfinished
        state = {"given": self.given, "unfinished": seeds}
        (checkpoint / TASKS_FILE).write_text(json.dumps(state))

    def restore(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / TASKS_FILE).read_text())
        self.given, self._unfinished = state["given"], state["unfinished"]
        self._next = itertools.count(self._first + self.given)
