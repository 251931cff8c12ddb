"""The log of one run: opened in its folder, read for a resume, written until the run has ended."""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from flash.config import Config
from flash.errors import LogFailure
from flash.log.config import ALL, LogConfig, shown
from flash.log.keeping import Keeping
from flash.log.log import Log
from flash.log.past import Past, take_over
from flash.log.reading import Reader
from flash.log.store import Change, Store, StoreError, sqlite_url
from flash.rollout.adaptive import AlphaState
from flash.section import revealed
from flash.system.durable import write_whole
from flash.types import Batch

ID_FILE = "log.id"  # what names the run in its database

_T = TypeVar("_T")


class RunLog:
    """Opens the store of a run; all that blocks is done in one thread.

    >>> async with RunLog(run, config.log) as run_log:
    ...     past = await run_log.take_over(...)
    ...     async with run_log.writing(past, alpha=adaptive.state) as log:
    ...         ...  # log is one of the run's observers

    `store` and `thread` are for other disks than this machine's, and other clocks.

    Raises ValueError for a database that can't be used, and LogFailure when it no longer can be.
    """

    def __init__(
        self,
        run: Path,
        settings: LogConfig,
        *,
        store: Callable[..., Store] | None = None,
        thread: Executor | None = None,
    ) -> None:
        self._run = run
        self._settings = settings
        self._make_store = store or Store
        self._thread = thread or ThreadPoolExecutor(1, "log")

    async def __aenter__(self) -> Self:
        try:
            self._store = await self._do(self._open)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        return self

    def _open(self) -> Store:
        path = self._run / ID_FILE
        if not path.exists():
            write_whole(path, uuid.uuid4().hex.encode())
        url = revealed(self._settings.url) or sqlite_url(self._run)
        return self._make_store(url, run=path.read_text(), name=self._run.name)

    async def __aexit__(self, *exc_info: object) -> None:
        await self._do(self._store.close)
        self._thread.shutdown()

    async def take_over(self, *, checkpoint: int | None, config: Config) -> Past:
        """See `flash.log.past.take_over`."""
        take = partial(take_over, self._store, checkpoint=checkpoint, config=config)
        return await self._read(take)

    @contextlib.asynccontextmanager
    async def writing(
        self,
        past: Past,
        *,
        alpha: Callable[[], AlphaState],
        needed_from: Callable[[], int] = lambda: 0,
    ) -> AsyncIterator[Log]:
        """Writes what is told to the Log until the block ends, and all of it then.

        `alpha` says how what decides α stands, `needed_from` which batches may be of use still; it
        is called in a thread.
        """
        loop_s = asyncio.get_running_loop().time
        began_at, began_s = time.time(), loop_s()
        log = Log(
            lambda changes: self._do(lambda: self._store.commit(changes)),
            start=past.start,
            first_numbers=past.first_numbers,
            known_version=past.logged_version,
            open_groups=[group.group for group in past.restored.groups],
            known_expert=past.known_expert,
            alpha=alpha,
            tidy=self._tidy(needed_from),
            now=lambda: began_at + loop_s() - began_s,
            max_lag_s=self._settings.max_lag_s,
            timeout_s=self._settings.timeout_s,
        )
        async with log:
            yield log

    def _tidy(
        self, needed_from: Callable[[], int]
    ) -> Callable[[], Awaitable[Sequence[Change] | None]] | None:
        """What makes room in the log, if anything does."""
        if self._settings.keep == ALL:
            return None
        keeping = Keeping(self._store, self._settings.keep, needed_from=needed_from)
        return lambda: self._do(keeping.bite)

    async def batches(self, version: int) -> AsyncIterator[list[Batch]]:
        """See `flash.trainer.redo.BatchLog`; up to one that it has the samples of no longer."""
        for whole in await self._ask(lambda reader: reader.whole_batches(version)):
            if not await self._ask(partial(Reader.has_samples, version=whole)):
                return
            yield await self._ask(partial(Reader.batch, version=whole))

    async def _ask(self, question: Callable[[Reader], _T]) -> _T:
        def reading() -> _T:
            with self._store.transaction() as connection:
                return question(Reader(connection, self._store.run))

        return await self._read(reading)

    async def _read(self, blocking: Callable[[], _T]) -> _T:
        try:
            return await self._do(blocking)
        except StoreError as error:
            raise LogFailure(f"the log {shown(self._store.url)} can't be read: {error}") from error

    async def _do(self, blocking: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, blocking)
