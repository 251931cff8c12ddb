"""Stopping on request: what is waited for is given up when somebody asks to stop."""

import asyncio
from collections.abc import Awaitable
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


async def _await(awaitable: Awaitable[_T]) -> _T:
    return await awaitable
