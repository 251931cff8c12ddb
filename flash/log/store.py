"""The log's database: one transaction for all that happened since the last one.

SQLite in the run's folder, or PostgreSQL by URL; every call blocks, and belongs into a thread.
"""

import contextlib
import functools
import os
import re
import sqlite3
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    Connection,
    Engine,
    Executable,
    Table,
    bindparam,
    create_engine,
    event,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    IntegrityError,
    ProgrammingError,
    SQLAlchemyError,
    StatementError,
)

from flash.errors import LogFailure
from flash.log.config import check_url, shown
from flash.log.schema import METADATA, RUNS

SQLITE_FILE = "log.sqlite"
_MIGRATIONS = Path(__file__).with_name("migrations")
_BUSY_S = 30.0  # another process may read, or be vacuuming
_LOCK = 0x666C617368  # of PostgreSQL, while the schema changes
_REMEDIES = {
    "password authentication failed|no password supplied": "give the right one, in PGPASSWORD, in "
    "~/.pgpass, or in a variable that holds the whole URL, $NAME",
    'role ".*" does not exist': "make it (createuser), or name another user",
    'database ".*" does not exist': "make it (createdb), or name another",
    "resolve host|translate host name": "correct the name of the host",
    "Connection refused|timeout": "start PostgreSQL there, or give the host and port where it runs",
    "No such file": "start PostgreSQL, or give the host where it runs, "
    "postgresql://user@host/database",
}
_OURS = IntegrityError, ProgrammingError, DataError  # which a second try can't mend
# One commit more of an owner, after so many.
_COUNT = (
    update(RUNS)
    .where(
        RUNS.c.run == bindparam("of"),
        RUNS.c.owner == bindparam("by"),
        RUNS.c.commits == bindparam("after"),
    )
    .values(commits=RUNS.c.commits + 1)
)


Verb = Literal["insert", "update", "delete"]


class Change(NamedTuple):
    """A row to write. Of an update or a delete the key columns in `values` say which rows."""

    verb: Verb
    table: Table
    values: dict[str, Any]


class StoreError(Exception):
    """The database could not do it now; it may later. The text says why, in a line."""


class Store:
    """One run's part of a database.

    Args:
        url: of SQLAlchemy; `sqlite:///…` or `postgresql://…`.
        run: its uuid.
        name: of the run, for those who read the database.

    Raises ValueError for a URL that is none, a database of a newer version, or one that can't be
    reached.
    """

    def __init__(self, url: str, *, run: str, name: str) -> None:
        self.url = url
        self._uuid, self._name = run, name
        self._owner = uuid.uuid4().hex
        self._commits = 0
        self.engine = open_engine(url)
        self._file = _file_of(self.engine)

    @functools.cached_property
    def run(self) -> int:
        """The run's number in this database; it is there from then on."""
        found = self.find()
        if found is None:
            insert = sqlite.insert if self.engine.dialect.name == "sqlite" else postgresql.insert
            row = {"uuid": self._uuid, "name": self._name, "owner": self._owner, "commits": 0}
            with self.transaction() as connection:
                connection.execute(insert(RUNS).values(row).on_conflict_do_nothing())
            found = self.find()
        assert found is not None
        return found

    def find(self) -> int | None:
        """The run's number, if this database has the run."""
        with self.transaction() as connection:
            return connection.scalar(select(RUNS.c.run).where(RUNS.c.uuid == self._uuid))

    def own(self) -> None:
        """From now on nobody else's commits are taken, of those who owned the run before."""
        with self.transaction() as connection:
            mine = RUNS.c.run == self.run
            connection.execute(update(RUNS).where(mine).values(owner=self._owner))
            self._commits = connection.scalars(select(RUNS.c.commits).where(mine)).one()

    def commit(self, changes: Sequence[Change]) -> None:
        """All of them or none, on disk when it returns; a second try of the same is harmless.

        Raises StoreError if it could not be done, LogFailure if it never can.
        """
        with self.transaction() as connection:
            mine = {"of": self.run, "by": self._owner, "after": self._commits}
            counted = connection.execute(_COUNT, mine)
            if counted.rowcount == 1:
                self._write(connection, changes)
            elif not self._was_committed(connection):
                raise LogFailure(
                    f"another process has gone on with the run {self._name}, and this one no "
                    f"longer owns its log ({shown(self.url)}): only one of them may run"
                )
        self._commits += 1

    def _was_committed(self, connection: Connection) -> bool:
        """Whether the last try came to the database, though its answer never came to us."""
        row = connection.execute(
            select(RUNS.c.owner, RUNS.c.commits).where(RUNS.c.run == self.run)
        ).one()
        return (row.owner, row.commits) == (self._owner, self._commits + 1)

    def _write(self, connection: Connection, changes: Sequence[Change]) -> None:
        """Inserts first: the others may be of rows that they make."""
        alike: dict[tuple[str, Table, tuple[str, ...]], list[dict[str, Any]]] = defaultdict(list)
        for change in changes:
            kind = change.verb, change.table, tuple(change.values)
            alike[kind].append({"run": self.run, **change.values})
        for (verb, table, names), rows in sorted(alike.items(), key=_inserts_first):
            statement = _statement(verb, table, ("run", *names))
            bound = rows if verb == "insert" else [_bound(row) for row in rows]
            connection.execute(statement, bound)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """StoreError for what the database can't do now, LogFailure for what is our fault."""
        if _file_of(self.engine) != self._file:
            # SQLite goes on writing a file that has no name any more, and nobody finds.
            raise LogFailure(
                f"the log {shown(self.url)} was removed, or another put in its place, while the "
                f"run went on: nothing that happens now could outlive it"
            )
        try:
            with self.engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            cause = " ".join(str(error.orig).split())
            if isinstance(error, _OURS):
                raise LogFailure(f"the log {shown(self.url)} refused a row: {cause}") from error
            raise StoreError(cause) from error
        except (StatementError, OverflowError, UnicodeError) as error:
            # A value that no column can hold.
            cause = " ".join(str(error).split())
            raise LogFailure(f"the log {shown(self.url)} can't hold a row: {cause}") from error

    def bytes_in_pages(self) -> int | None:
        """What SQLite's pages in use take; None of a database whose pages are not the run's own."""
        if self.engine.dialect.name != "sqlite":
            return None
        with self.transaction() as connection:
            pages, free, page_bytes = _pages(connection)
        return (pages - free) * page_bytes

    def give_back(self, most: int, *, leave: float) -> bool:
        """Makes SQLite's file smaller, by so many free pages at most; whether there are more.

        That share of its pages may stay free. PostgreSQL's autovacuum sees to its own.
        """
        if self.engine.dialect.name != "sqlite":
            return False
        with self.transaction() as connection:
            pages, free, page_bytes = _pages(connection)
        too_many = free - int(leave * pages)
        if too_many > 0:
            self._pragma(f"incremental_vacuum({min(most, too_many)})")
        if too_many > most:
            return True
        if os.stat(str(self.engine.url.database)).st_size > (pages - too_many) * page_bytes:
            # It is as long as it was until then. Who reads just now is not waited for.
            self._pragma("wal_checkpoint(PASSIVE)")
        return False

    def _pragma(self, what: str) -> None:
        """In a transaction of its own, to its end: a row a page, of which `execute` takes one."""
        connection = self.engine.raw_connection()
        try:
            connection.cursor().executescript(f"PRAGMA {what}")
        except sqlite3.OperationalError as error:
            raise StoreError(str(error)) from error
        finally:
            connection.close()

    def close(self) -> None:
        self.engine.dispose()


def _pages(connection: Connection) -> tuple[int, int, int]:
    """How many SQLite has, how many of them are free, and how large one is."""
    pages, free, page_bytes = (
        int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
        for name in ("page_count", "freelist_count", "page_size")
    )
    return pages, free, page_bytes


def _file_of(engine: Engine) -> tuple[int, int] | None:
    """Which file SQLite's database is; None if it is not there, or in no file."""
    if engine.dialect.name != "sqlite" or not engine.url.database:
        return None
    try:
        found = os.stat(engine.url.database)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def sqlite_url(run: Path) -> str:
    return f"sqlite:///{(run / SQLITE_FILE).absolute()}"


def open_engine(url: str) -> Engine:
    """A database with the present schema; ValueError if there can be none at this URL."""
    if not url.startswith("sqlite:///"):
        check_url(url)
    try:
        engine = create_engine(_with_driver(url), connect_args=_connect_args(url))
    except (ArgumentError, ValueError) as error:  # a port that is no number is the latter
        raise ValueError(
            f"log.url={shown(url)!r} is no URL of a database ({error}): write "
            f"postgresql://user@host:5432/database"
        ) from error
    except ImportError as error:  # of psycopg, or of the library that it needs
        raise ValueError(
            f"log.url={shown(url)!r} needs psycopg, which can't be imported: "
            f"pip install 'flash-rl[postgres]'"
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    try:
        _bring_up_to_date(engine)
    except (SQLAlchemyError, ValueError) as error:
        engine.dispose()
        cause = " ".join(str(getattr(error, "orig", error)).split())
        if engine.dialect.name == "postgresql" and isinstance(error, DBAPIError):
            cause = f"{cause.partition(' Is the server running')[0]}: {_remedy(cause)}"
        raise ValueError(f"log.url={shown(url)!r}: {cause}") from error
    return engine


def _remedy(cause: str) -> str:
    """What can be done where PostgreSQL can't be reached, or lets nobody in."""
    return next(
        (remedy for said, remedy in _REMEDIES.items() if re.search(said, cause)),
        "correct it, postgresql://user@host/database",
    )


def _with_driver(url: str) -> str:
    """psycopg for PostgreSQL, however the URL is written."""
    for scheme in ("postgres://", "postgresql://"):
        if url.startswith(scheme):
            return "postgresql+psycopg://" + url.removeprefix(scheme)
    return url


def _connect_args(url: str) -> dict[str, Any]:
    # The connection is handed from thread to thread, one at a time.
    if url.startswith("sqlite"):
        return {"timeout": _BUSY_S, "check_same_thread": False}
    return {"connect_timeout": 10}


def _set_up_sqlite(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver begins no transaction: `_begin_sqlite` does
    cursor = connection.cursor()
    # Once for a database, before its first table: what is deleted can be given back in parts.
    cursor.execute("PRAGMA auto_vacuum = INCREMENTAL")
    _use_wal(cursor)
    cursor.execute("PRAGMA synchronous = FULL")  # a commit is on disk when it returns
    cursor.close()


def _use_wal(cursor: Any) -> None:
    """Once for a database. Here the driver doesn't wait for another process that does the same."""
    until = time.monotonic() + _BUSY_S
    while cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    # The driver would leave the making of tables, and what is read, outside of any transaction.
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))


def _lock(connection: Connection) -> None:
    """From now on no other process changes the schema, until this transaction has ended."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
    else:
        connection.execution_options(begin="BEGIN IMMEDIATE")


def _present(connection: Connection) -> str | None:
    """The schema's version; None if there is none."""
    return MigrationContext.configure(connection).get_current_revision()


def _bring_up_to_date(engine: Engine) -> None:
    """Makes the tables, or changes those of an older version."""
    scripts = ScriptDirectory(str(_MIGRATIONS))
    head = scripts.get_current_head()
    with engine.connect() as connection:
        if _present(connection) == head:  # what only reads takes no lock
            return
    with engine.connect() as connection:
        _lock(connection)
        if (present := _present(connection)) != head:
            _change(connection, present, scripts)
        connection.commit()


def _change(connection: Connection, present: str | None, scripts: ScriptDirectory) -> None:
    config = AlembicConfig()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["connection"] = connection
    if present is None and not inspect(connection).has_table(RUNS.name):
        METADATA.create_all(connection)
        command.stamp(config, "head")
        return
    if present not in {revision.revision for revision in scripts.walk_revisions()}:
        raise ValueError(
            f"its schema is of version {present!r}, this flash knows "
            f"{scripts.get_current_head()!r} and older ones: install the flash that wrote it, or a "
            f"newer one"
        )
    command.upgrade(config, "head")


def _inserts_first(of_kind: tuple[tuple[str, Table, tuple[str, ...]], object]) -> int:
    return ("insert", "update", "delete").index(of_kind[0][0])


@functools.lru_cache
def _statement(verb: str, table: Table, names: tuple[str, ...]) -> Executable:
    if verb == "insert":
        return table.insert()
    keys = [column for column in table.primary_key if column.name in names]
    found = [column == bindparam(f"_{column.name}") for column in keys]
    if verb == "delete":
        return table.delete().where(*found)
    key_names = {column.name for column in keys}
    values: dict[str, Any] = {
        name: bindparam(f"_{name}") for name in names if name not in key_names
    }
    return table.update().where(*found).values(values)


def _bound(row: dict[str, Any]) -> dict[str, Any]:
    # A parameter may not have a column's own name in an update.
    return {f"_{name}": value for name, value in row.items()}
