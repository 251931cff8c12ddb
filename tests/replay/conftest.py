"""A run's log for each test."""

import pytest

from tests.replay.logged import Logged


@pytest.fixture
def logged(tmp_path):
    run = Logged(tmp_path)
    yield run
    run.store.close()
