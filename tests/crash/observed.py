"""`flash`, as the harness runs it: it tells of the weights it exports, and can die in mid-commit.

python -m tests.crash.observed train …

CRASH_WEIGHTS   a file; each export adds a line: start, policy version, a sum over the tensors
CRASH_START     the number of this start, for these lines
CRASH_COMMIT    a file; when it is there, the next commit of the log ends the process, at the
                place that it names: `first`, before a row; `midway`, after half of them;
                `last`, before the commit; `after`, on disk and nobody told
"""

import functools
import hashlib
import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from flash.cli.main import main
from flash.log.store import Change, Store
from flash.trainer.trainer import Trainer
from flash.types import Weights


def sum_of(folder: Path) -> str:
    """Over the files of an export."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        found.update(path.read_bytes())
    return found.hexdigest()


def telling(export: Callable[[Trainer], Any], weights: Path, start: int) -> Callable[..., Any]:
    """The export, with a line of it in that file before anybody can see the weights."""

    @functools.wraps(export)
    async def export_weights(trainer: Trainer) -> Weights:
        exported: Weights = await export(trainer)
        line = {"start": start, "version": exported.version, "sum": sum_of(exported.path)}
        with weights.open("a") as file:
            file.write(json.dumps(line) + "\n")
        return exported

    return export_weights


class DyingStore(Store):
    """Ends the process at the place that a file names, as soon as it is there."""

    switch: Path

    def commit(self, changes: Sequence[Change]) -> None:
        super().commit(changes)
        self._die_at("after")

    def _write(self, connection: Connection, changes: Sequence[Change]) -> None:
        self._die_at("first")
        half = len(changes) // 2
        if self._place() == "midway":
            super()._write(connection, [c for c in changes if c.verb == "insert"][:half])
            self._die_at("midway")
        super()._write(connection, changes)
        self._die_at("last")

    def _place(self) -> str:
        return self.switch.read_text() if self.switch.exists() else ""

    def _die_at(self, place: str) -> None:
        if self._place() == place:
            os.kill(os.getpid(), signal.SIGKILL)


def observed() -> None:
    """Puts these in the places of the parts that a run makes of its configuration."""
    from flash.log import run_log  # noqa: PLC0415  (slow, and not for the reward processes)

    Trainer.export_weights = telling(  # type: ignore[method-assign]
        Trainer.export_weights,
        Path(os.environ["CRASH_WEIGHTS"]),
        int(os.environ["CRASH_START"]),
    )
    DyingStore.switch = Path(os.environ["CRASH_COMMIT"])
    run_log.Store = DyingStore  # type: ignore[attr-defined]


if __name__ == "__main__":
    observed()
    main()
