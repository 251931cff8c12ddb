"""What steps come to that a resume trains again, beside what the log says that they came to."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from flash.rollout.observer import Observer

logger = logging.getLogger(__name__)

# What a trainer tells that is not of its weights and samples alone: times, how often ranks were
# started, and a gap that the probe of a publish had its part in.
_NOT_OF_WEIGHTS = ("time/", "trainer/restarts", "logprob_gap/")
_SHARE, _LEAST = 0.01, 1e-3


class RedoneSteps(Observer):
    """Compares them; the first that is different is told.

    Args:
        lines: of metrics.jsonl, of the steps done until now; it hears of those to come.
        exact: whether numbers must be equal, as in float32 on a CPU. If not, they may differ by 1%
            or by 0.001.
    """

    def __init__(self, lines: Iterable[Mapping[str, Any]], *, exact: bool) -> None:
        self._lines = {int(line["step"]): line for line in lines}
        self._exact = exact
        self._redone = 0
        self._different_from: int | None = None

    def measured(self, metrics: Mapping[str, Any]) -> None:
        self._lines[int(metrics["step"])] = metrics

    def redone(self, step: int, metrics: Mapping[str, float]) -> None:
        """That step was trained again, and came to these numbers."""
        logged = self._lines.get(step)
        if logged is None:
            return
        self._redone += 1
        if self._different_from is not None:
            return
        for name, now in metrics.items():
            before = logged.get(name)
            if before is None or name.startswith(_NOT_OF_WEIGHTS) or self._equal(before, now):
                continue
            self._different_from = step
            logger.warning(
                "step %d, trained again, has %s %r, and %r was logged: the weights are not quite "
                "those of before. Another machine, torch or transformers, other trainer.threads or "
                "trainer.ranks, or a loss that is not the same each time may do that; the run goes "
                "on with these",
                step, name, now, before,
            )  # fmt: skip
            return

    def _equal(self, before: float, now: float) -> bool:
        if not math.isfinite(now):
            return False  # what was logged was a number
        if self._exact:
            return before == now
        return math.isclose(before, now, rel_tol=_SHARE, abs_tol=_LEAST)

    def describe(self) -> str:
        """In a line, what was redone; empty if nothing was."""
        if not self._redone:
            return ""
        what = f"redone {self._redone} {'step' if self._redone == 1 else 'steps'}, "
        if self._different_from is not None:
            return f"{what}with other numbers than logged from step {self._different_from} on"
        return f"{what}numbers as logged"
