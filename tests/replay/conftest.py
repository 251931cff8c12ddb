"""A run's log for each test, and a PostgreSQL for those that ask for it."""

import pytest

from tests.postgres import postgres
from tests.replay.logged import Logged


@pytest.fixture
def logged(tmp_path):
    run = Logged(tmp_path)
    yield run
    run.store.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    with postgres(tmp_path_factory.mktemp("postgres")) as running:
        yield running
