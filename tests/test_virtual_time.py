import asyncio
import time

import pytest

from flash import virtual_time


def test_a_day_passes_at_once_and_in_order():
    order = []

    async def one(name, seconds):
        await asyncio.sleep(seconds)
        order.append((name, asyncio.get_running_loop().time()))

    async def main():
        await asyncio.gather(one("b", 86_400), one("a", 1), one("c", 86_400))

    began = time.monotonic()
    virtual_time.run(main())
    assert time.monotonic() - began < 5
    assert order == [("a", 1), ("b", 86_400), ("c", 86_400)]


def test_timeouts_fire_at_their_time():
    async def main():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(30):
                await asyncio.Event().wait()
        return asyncio.get_running_loop().time()

    assert virtual_time.run(main()) == 30


def test_a_wait_that_nothing_can_end_is_an_error_that_names_the_tasks():
    async def main():
        asyncio.current_task().set_name("the stuck one")
        await asyncio.Event().wait()

    with pytest.raises(virtual_time.Deadlock, match="the stuck one"):
        virtual_time.run(main())
