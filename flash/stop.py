"""Stopping on request: what is waited for is given up when somebody asks to stop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

from flash.errors import first_error

_T = TypeVar("_T")


async def unless(stop: asyncio.Event, awaitable: Awaitable[_T]) -> _T | None:
    """The awaitable's result; None, and the awaitable cancelled, if `stop` is set first."""
    with first_error():
        async with asyncio.TaskGroup() as tasks:
            wanted = tasks.create_task(_await(awaitable), name="until stopped")
            stopped = tasks.create_task(stop.wait(), name="stop")
            await asyncio.wait((wanted, stopped), return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if not wanted.done():
                wanted.cancel()
    return None if wanted.cancelled() else wanted.result()


class Opening:
    """What `given_up_by` may still give up."""

    def __init__(self, watch: asyncio.Task[None]) -> None:
        self._watch = watch

    def is_over(self) -> None:
        """From now on nothing is given up."""
        self._watch.cancel()


@contextlib.asynccontextmanager
async def given_up_by(stop: asyncio.Event) -> AsyncIterator[Opening]:
    """Leaves the block, by cancelling it, when `stop` is set before its `Opening.is_over`."""

    async def watch(limit: asyncio.Timeout) -> None:
        await stop.wait()
        limit.reschedule(asyncio.get_running_loop().time())

    with first_error():
        async with asyncio.TaskGroup() as tasks:
            limit = asyncio.timeout(None)
            try:
                async with limit:
                    watching = tasks.create_task(watch(limit), name="stop while opening")
                    try:
                        yield Opening(watching)
                    finally:
                        watching.cancel()
            except TimeoutError:
                if not limit.expired():
                    raise


async def _await(awaitable: Awaitable[_T]) -> _T:
    return await awaitable
