"""A disk that goes wrong, below a log that is the production's, under virtual time.

RunLog ─► Disk, as its thread ─► FaultyStore ─► SQLite's driver
          takes virtual time     which says that the disk is full, or read-only, or that
                                 fsync failed: before a commit, or after it took effect
"""

import asyncio
import contextlib
import random
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np

from flash.log.store import Change, Store
from tests.faults.faulty import Faults

# What ails a disk, in SQLite's words.
AILMENTS = {
    "disk_full": "database or disk is full",
    "disk_readonly": "attempt to write a readonly database",
    "disk_fsync": "disk I/O error",
}
LONGEST_S = 45.0  # that one transaction takes
FILES = ("log.sqlite", "log.sqlite-wal", "log.id")


class Disk(Executor):
    """One thread's work, one piece after another; each takes a while, and may fail.

    `at_commit` is called within each commit, at the place that it names.
    """

    def __init__(self, faults: Faults) -> None:
        self.ails = ""
        self.trying_since: float | None = None  # what is being written, and is not done
        self.failed_at: float | None = None  # when it was last said that it can't be
        self.at_commit: Callable[[str], None] = lambda place: None
        self._faults = faults
        self._rng = random.Random(faults.rng.random())
        self._free_at = 0.0
        self._ails_until = 0.0
        self._is_commit = False

    def submit(self, work: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        loop = asyncio.get_running_loop()
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        seconds = self._seconds()
        begins = max(loop.time(), self._free_at)
        ends = self._free_at = begins + seconds
        loop.call_at(self._rng.uniform(begins, ends), self._do, future, begins, ends, work)
        return future

    def _seconds(self) -> float:
        slow = self._faults.draw("disk_slow") is not None
        return self._rng.uniform(1, LONGEST_S) if slow else self._rng.uniform(0, 0.02)

    def _do(self, future: Future[Any], since: float, until: float, work: Callable[[], Any]) -> None:
        self._is_commit = False
        try:
            result, error = work(), None
        except Exception as raised:
            result, error = None, raised
        if self._is_commit and self.trying_since is None:
            self.trying_since = since
        tell = self._tell_of_commit if self._is_commit else _tell
        asyncio.get_running_loop().call_at(until, tell, future, result, error)

    def _tell_of_commit(self, future: Future[Any], result: Any, error: Exception | None) -> None:
        if error is None:
            self.trying_since = self.failed_at = None
        elif self.failed_at is None:
            self.failed_at = asyncio.get_running_loop().time()
        _tell(future, result, error)

    # ── what the store asks of it ────────────────────────────────────────────────────────────

    def begin_commit(self) -> None:
        now = asyncio.get_running_loop().time()
        self._is_commit = True
        if now >= self._ails_until:
            self.ails = ""
        if not self.ails and (kind := self._faults.draw(*AILMENTS)):
            self.ails = kind
            forever = self._faults.draw("disk_forever") is not None
            lasts = self._rng.choice([0.0, 5.0, 50.0]) * self._rng.random()
            self._ails_until = 1e9 if forever else now + lasts

    def allow(self, place: str) -> None:
        """Raises what ails it, if that shows at this place of a transaction."""
        if not self._is_commit:
            if self._faults.draw("log_unreadable"):
                raise sqlite3.OperationalError(AILMENTS["disk_fsync"])
            return
        self.at_commit(place)
        if self.ails and self._shows_at(place):
            raise sqlite3.OperationalError(AILMENTS[self.ails])

    def _shows_at(self, place: str) -> bool:
        if self.ails == "disk_fsync":
            # The last place is sure to come: what an fsync that failed has written is unknown.
            return place == "committed" or (place == "commit" and self._rng.random() < 0.5)
        return place == "commit" or self._rng.random() < 0.2


class FaultyStore(Store):
    """A Store on that disk."""

    def __init__(self, url: str, *, run: str, name: str, disk: Disk) -> None:
        self._disk = disk
        super().__init__(url, run=run, name=name)
        dialect = self.engine.dialect
        do_commit, do_execute = dialect.do_commit, dialect.do_execute

        def commit(connection: Any) -> None:
            disk.allow("commit")
            do_commit(connection)
            disk.allow("committed")

        def execute(cursor: Any, statement: str, *rest: Any) -> None:
            disk.allow("row")
            do_execute(cursor, statement, *rest)

        dialect.do_commit, dialect.do_execute = commit, execute  # type: ignore[method-assign]

    def own(self) -> None:
        try:
            super().own()
        finally:  # if it failed, that may have been after it took effect
            with contextlib.closing(sqlite3.connect(self.engine.url.database)) as looks:
                if looks.execute("SELECT owner FROM runs").fetchall() == [(self._owner,)]:
                    self._disk.at_commit("owned")

    def commit(self, changes: Sequence[Change]) -> None:
        self._disk.begin_commit()
        super().commit(changes)


def copy(folder: Path, to: Path) -> None:
    """What a process that dies now leaves."""
    to.mkdir()
    for name in FILES:
        if (folder / name).exists():
            (to / name).write_bytes((folder / name).read_bytes())


def copy_torn(before: Path, after: Path, to: Path, rng: random.Random) -> None:
    """What is left of a commit if the disk has some part of what it wrote, and not its end."""
    copy(before, to)
    log = FILES[1]
    old, new = ((folder / log).read_bytes() for folder in (before, after))
    was = np.frombuffer(old.ljust(len(new), b"\0"), np.uint8)
    written = np.flatnonzero(was != np.frombuffer(new, np.uint8))
    end = rng.randint(written[0], written[-1])
    (to / log).write_bytes(new[:end] + old[end:])


def _tell(future: Future[Any], result: Any, error: Exception | None) -> None:
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
