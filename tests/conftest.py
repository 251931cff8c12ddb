"""Shared by all tests."""

import asyncio
import os
import tempfile
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from flash.system.process import lasting

if TYPE_CHECKING:
    from tests.postgres import Postgres

# An example's time says how busy the machine is, and nothing of the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """What is imported lives as long as the tests: it need not be searched for garbage."""
    with lasting():
        return (yield)


@pytest.fixture(scope="session", autouse=True)
def _default_event_loop() -> Iterator[None]:
    """pytest-asyncio asks for the default loop, which would be made then and never closed."""
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    yield
    asyncio.set_event_loop(None)
    loop.close()


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where `datasets`, which asks once for it, puts the rows of files that tests make."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    yield


@pytest.fixture(scope="session")
def database_server() -> Iterator["Postgres"]:
    """A PostgreSQL for all tests that ask for one: it takes seconds to be made.

    Where root runs them the server is another user's, whom the next pytest that starts would shut
    out of the folder that all of them share.
    """
    from tests.postgres import postgres  # noqa: PLC0415 (psycopg is an extra)

    with tempfile.TemporaryDirectory() as folder, postgres(Path(folder)) as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: one that is left for the end keeps one core busy."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # noqa: PLC0415 (most tests never need it)

        if not torch.cuda.is_available():
            pytest.skip("needs an NVIDIA GPU")
