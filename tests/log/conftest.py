"""Where a log lies: each test that asks for `url` runs on SQLite and on PostgreSQL."""

import uuid

import pytest

from flash.log.store import Store, sqlite_url


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def url(request, tmp_path):
    """Of a database that nothing is in."""
    if request.param == "sqlite":
        return sqlite_url(tmp_path)
    return request.getfixturevalue("database_server").new_database()


@pytest.fixture
def open_store(url):
    """Opens stores of one run, in that database; closed with the test."""
    run, opened = uuid.uuid4().hex, []

    def open_another(*, own: bool = True, kind: type[Store] = Store) -> Store:
        opened.append(store := kind(url, run=run, name="run"))
        if own:
            store.own()
        return store

    yield open_another
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store):
    return open_store()
