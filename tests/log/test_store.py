"""One transaction for what happened: all of it or nothing, once, and by one owner only."""

import contextlib
import sqlite3
import subprocess
import sys
import uuid

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, func, inspect, select, text
from sqlalchemy.exc import OperationalError

from flash.errors import LogFailure
from flash.log import store as store_module
from flash.log.config import shown
from flash.log.schema import GROUPS, METADATA
from flash.log.store import Change, Store, StoreError, open_engine, sqlite_url


def group(number, **values):
    return Change(
        "insert", GROUPS,
        {"group": number, "start": 1, "seed": 7, "options": {}, "begun_at": 0.0} | values,
    )  # fmt: skip


def groups(store):
    with store.transaction() as connection:
        query = select(GROUPS.c.group).where(GROUPS.c.run == store.run).order_by(GROUPS.c.group)
        return connection.scalars(query).all()


def cut(moment):
    """Calls `moment` with the store as each transaction of a commit is about to end."""

    class Cut(Store):
        def _write(self, connection, changes):
            super()._write(connection, changes)
            moment(self, connection)

    return Cut


# ── commits ──────────────────────────────────────────────────────────────────────────────────


def test_a_commit_is_there_for_another_process_s_eyes(open_store):
    store = open_store()
    store.commit([group(1), group(2)])
    assert groups(open_store(own=False)) == [1, 2]


def test_a_commit_that_fails_in_the_middle_leaves_nothing_and_can_be_tried_again(open_store):
    fails = [True]

    def fail_once(store, connection):
        if fails:
            fails.clear()
            raise OperationalError("", {}, Exception("the disk is full"))

    store = open_store(kind=cut(fail_once))
    with pytest.raises(StoreError, match="the disk is full"):
        store.commit([group(1)])
    assert groups(store) == []
    store.commit([group(1)])
    assert groups(store) == [1]


def test_a_commit_whose_end_nobody_heard_of_is_not_done_twice(open_store):
    """It came to the database, and the answer was lost; so it is tried again."""
    lost = [True]

    def commit_now(store, connection):
        if lost:
            lost.clear()
            connection.commit()
            raise OperationalError("", {}, Exception("the connection was lost"))

    store = open_store(kind=cut(commit_now))
    with pytest.raises(StoreError, match="the connection was lost"):
        store.commit([group(1)])
    assert groups(store) == [1]
    store.commit([group(1)])
    store.commit([group(2)])
    assert groups(store) == [1, 2]


def test_rows_are_made_before_what_changes_them_in_whatever_order_they_came(store):
    change = Change("update", GROUPS, {"group": 1, "outcome": "trained"})
    store.commit([change, group(1)])
    with store.transaction() as connection:
        assert connection.scalar(select(GROUPS.c.outcome)) == "trained"


def test_a_row_that_is_there_already_is_our_fault_and_not_tried_again(store):
    store.commit([group(1)])
    with pytest.raises(LogFailure, match="refused a row: .*"):
        store.commit([group(1)])


@pytest.mark.parametrize("seed", [2**70, object(), "\ud800"])
def test_a_value_that_no_column_holds_is_our_fault_too(store, seed):
    with pytest.raises(LogFailure, match="a row: "):
        store.commit([group(1, seed=seed)])
    store.commit([group(1)])
    assert groups(store) == [1]


# ── owners ───────────────────────────────────────────────────────────────────────────────────


def test_a_second_owner_fences_off_the_first(open_store):
    first = open_store()
    first.commit([group(1)])
    second = open_store()
    with pytest.raises(LogFailure, match="another process has gone on with the run run"):
        first.commit([group(2)])
    second.commit([group(3)])
    with pytest.raises(LogFailure):
        first.commit([group(4)])
    assert groups(second) == [1, 3]


def test_a_first_owner_s_lost_answer_is_not_taken_for_its_own_after_a_second_came(open_store):
    first, second = open_store(), open_store()
    second.commit([group(1)])  # the same count of commits as the first one's next
    with pytest.raises(LogFailure):
        first.commit([group(1)])


def test_runs_in_one_database_are_apart(url, store):
    other = Store(url, run=uuid.uuid4().hex, name="other")
    other.own()
    store.commit([group(1)])
    other.commit([group(1), group(2)])
    assert (groups(store), groups(other)) == ([1], [1, 2])
    other.close()


# ── the schema ───────────────────────────────────────────────────────────────────────────────


# What takes the present schema back to the first.
FIRST_SCHEMA = [
    "DROP TABLE expert",
    "DROP TABLE expert_samples",
    "ALTER TABLE batches DROP COLUMN expert_weight",
    "ALTER TABLE groups DROP COLUMN task_set",
    "ALTER TABLE episodes DROP COLUMN task_set",
    "ALTER TABLE completions DROP COLUMN experts",
    "ALTER TABLE sequences DROP COLUMN experts",
    "ALTER TABLE episodes DROP COLUMN role_rewards",
    "ALTER TABLE sequences DROP COLUMN role",
]


def test_a_new_database_equals_one_upgraded_from_the_first(url):
    engine = open_engine(url)
    with engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
        config = Config()
        config.set_main_option("script_location", str(store_module._MIGRATIONS))
        config.attributes["connection"] = connection
        for statement in FIRST_SCHEMA:
            connection.execute(text(statement))
        command.stamp(config, "0001")
        command.upgrade(config, "head")
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
    engine.dispose()


def test_a_schema_that_differs_is_seen_to(url):
    engine = open_engine(url)
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE starts DROP COLUMN flash"))
        found = compare_metadata(MigrationContext.configure(connection), METADATA)
        assert [change[0] for change in found] == ["add_column"]
    engine.dispose()


def test_a_database_of_a_newer_flash_is_refused_by_name(url):
    engine = open_engine(url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(ValueError, match=r"its schema is of version '9999', this flash knows "):
        open_engine(url)


def test_what_was_cut_off_as_the_tables_were_made_is_no_half_database(url, monkeypatch):
    def fail(connection):
        raise OperationalError("", {}, Exception("killed"))

    with monkeypatch.context() as patch:
        patch.setattr(store_module.command, "stamp", lambda config, revision: fail(config))
        with pytest.raises(ValueError, match="killed"):
            open_engine(url)
    engine = create_engine(store_module._with_driver(url))
    assert inspect(engine).get_table_names() == []
    engine.dispose()
    open_engine(url).dispose()


_OPEN = """
import sys
from flash.log.store import Store

url, run = sys.argv[1:]
print("here", flush=True)
sys.stdin.readline()
store = Store(url, run=run, name="run")
print(store.run)
store.close()
"""


@pytest.mark.slow
def test_processes_that_open_a_new_database_at_once_all_find_it_whole(url):
    with contextlib.ExitStack() as ended:
        processes = [
            ended.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", _OPEN, url, f"{number:032}"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for number in range(3)
        ]
        for process in processes:
            assert process.stdout.readline() == "here\n"
        for process in processes:
            process.stdin.write("now\n")
            process.stdin.flush()
        numbers = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert numbers == {"1", "2", "3"}


# ── what the database does ───────────────────────────────────────────────────────────────────


def test_sqlite_keeps_what_it_has_committed_when_the_power_fails(tmp_path):
    """As far as it can be seen: it waits for the disk, and can shrink without a stop."""
    store = Store(sqlite_url(tmp_path), run="r", name="run")
    with store.transaction() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("synchronous", "journal_mode", "auto_vacuum")
        }
    assert pragmas == {"synchronous": 2, "journal_mode": "wal", "auto_vacuum": 2}
    store.close()


def test_a_reader_s_view_does_not_change_in_the_middle(open_store):
    """What a resume and a replay read fits together, whatever is written meanwhile."""
    if open_store().engine.dialect.name != "sqlite":
        pytest.skip("PostgreSQL's transactions read what is committed, statement by statement")
    writer, reader = open_store(), open_store(own=False)
    count = select(func.count()).select_from(GROUPS)
    with reader.transaction() as connection:
        assert connection.scalar(count) == 0
        writer.commit([group(1)])
        assert connection.scalar(count) == 0
    with reader.transaction() as connection:
        assert connection.scalar(count) == 1


def test_a_file_that_is_no_database_is_named(tmp_path):
    (tmp_path / "log.sqlite").write_text("no database at all, of more than some sixteen bytes")
    with pytest.raises(ValueError, match=r"log.sqlite': file is not a database"):
        Store(sqlite_url(tmp_path), run="r", name="run")


def test_another_process_that_writes_is_waited_for_and_then_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_BUSY_S", 0.01)
    store = Store(sqlite_url(tmp_path), run="r", name="run")
    store.own()
    other = sqlite3.connect(tmp_path / "log.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="database is locked"):
        store.commit([group(1)])
    other.execute("ROLLBACK")
    store.commit([group(1)])
    assert groups(store) == [1]
    other.close()
    store.close()


@pytest.mark.slow
def test_postgresql_that_is_killed_and_started_again_has_all_that_was_committed(database_server):
    store = Store(database_server.new_database(), run="r", name="run")
    store.own()
    store.commit([group(1)])
    database_server.kill()
    with pytest.raises(StoreError):
        store.commit([group(2)])
    database_server.start()
    store.commit([group(2)])
    assert groups(store) == [1, 2]
    store.close()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("postgresql://me:secret@host/db", "postgresql://…@host/db"),
        ("postgresql://host/db?password=secret&sslmode=on", "postgresql://host/db?password=…&sslmode=on"),
        ("postgresql://me:se@cret@host/db", "postgresql://…@host/db"),
        ("sqlite:////tmp/log.sqlite", "/tmp/log.sqlite"),
    ],
)  # fmt: skip
def test_no_password_is_shown(given, told):
    assert shown(given) == told
