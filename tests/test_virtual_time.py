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


def test_ties_are_broken_in_the_same_way_each_time():
    async def main():
        loop, order = asyncio.get_running_loop(), []
        for number in range(100):
            loop.call_later(0.1, order.append, number)
        await asyncio.sleep(0.2)
        return order

    order = virtual_time.run(main())
    assert sorted(order) == list(range(100))
    assert virtual_time.run(main()) == order


def test_time_stands_still_while_anything_can_run():
    async def main():
        for _ in range(1000):
            await asyncio.sleep(0)
        return asyncio.get_running_loop().time()

    assert virtual_time.run(main()) == 0


def test_a_deadlock_behind_the_last_timer_is_found_too():
    async def main():
        await asyncio.sleep(10**6)
        await asyncio.Lock().acquire()
        await asyncio.get_running_loop().create_future()

    with pytest.raises(virtual_time.Deadlock):
        virtual_time.run(main())
