"""SQLite's files as a kill leaves them, or a disk that lost the end of what was written."""

import shutil

import pytest
from sqlalchemy import func, select

from flash.config import load
from flash.log.past import take_over
from flash.log.schema import GROUPS
from flash.log.store import Change, Store, sqlite_url

TOLD = {"config": load("frozen_lake", {"group_size": 2, "batch_size": 2})}


def group(number: int) -> Change:
    values = {"group": number, "start": 1, "seed": number, "options": {}, "begun_at": 0.0}
    return Change("insert", GROUPS, values)


@pytest.fixture
def killed(tmp_path):
    """The folder of a run that was killed after four commits."""
    alive, dead = tmp_path / "alive", tmp_path / "dead"
    alive.mkdir()
    store = Store(sqlite_url(alive), run="a" * 32, name="run")
    store.own()
    for number in range(4):
        store.commit([group(number)])
    shutil.copytree(alive, dead, ignore=shutil.ignore_patterns("*-shm"))
    store.close()
    return dead


def dispatched(folder) -> list[int]:
    store = Store(sqlite_url(folder), run="a" * 32, name="run")
    past = take_over(store, checkpoint=0, **TOLD)
    with store.transaction() as connection:
        count = connection.scalar(select(func.count()).select_from(GROUPS))
    store.close()
    (seeds,) = past.dispatched.values()
    assert count == len(seeds)
    return list(seeds)


def test_all_that_was_committed_is_there_after_a_kill(killed):
    assert (killed / "log.sqlite-wal").stat().st_size > 0
    assert dispatched(killed) == [0, 1, 2, 3]


@pytest.mark.parametrize("lost", [1, 4000])
def test_a_commit_of_which_the_end_is_missing_is_none_and_those_before_are_whole(killed, lost):
    wal = killed / "log.sqlite-wal"
    wal.write_bytes(wal.read_bytes()[:-lost])
    assert dispatched(killed) == [0, 1, 2]


def test_a_commit_in_which_a_byte_is_wrong_is_none(killed):
    wal = killed / "log.sqlite-wal"
    content = bytearray(wal.read_bytes())
    content[-100] ^= 1
    wal.write_bytes(bytes(content))
    assert dispatched(killed) == [0, 1, 2]


def test_a_file_that_is_no_database_is_named(killed):
    (killed / "log.sqlite-wal").unlink()
    (killed / "log.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(ValueError, match=r"log.sqlite'?: file is not a database"):
        dispatched(killed)
