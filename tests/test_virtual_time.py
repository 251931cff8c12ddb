import asyncio
import socket
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


def test_timers_of_the_same_time_are_called_in_the_order_in_which_they_were_set():
    async def main():
        loop, order = asyncio.get_running_loop(), []
        for number in range(100):
            loop.call_later(0.1, order.append, number)
        await asyncio.sleep(0.2)
        return order

    assert virtual_time.run(main()) == list(range(100))


def test_cancelled_timers_are_not_called_and_not_kept():
    async def main():
        loop, called = asyncio.get_running_loop(), []
        for _ in range(20):
            timers = [loop.call_later(1000, called.append, number) for number in range(100)]
            for timer in timers[1:]:
                timer.cancel()
        kept = len(loop._timers)
        await asyncio.sleep(2000)
        return kept, called

    kept, called = virtual_time.run(main())
    assert kept < 300
    assert called == [0] * 20


def test_a_timer_may_be_cancelled_in_the_moment_in_which_it_is_due():
    async def main():
        loop, called = asyncio.get_running_loop(), []

        def cancel():
            late.cancel()

        loop.call_later(1, cancel)
        late = loop.call_later(1, called.append, "late")
        await asyncio.sleep(2)
        late.cancel()
        return called

    assert virtual_time.run(main()) == []


def test_who_is_not_under_virtual_time_is_heard_while_everybody_waits():
    async def main():
        heard = []
        ours, theirs = socket.socketpair()
        with ours, theirs:
            asyncio.get_running_loop().add_reader(ours, lambda: heard.append(ours.recv(1)))
            theirs.send(b"x")
            await asyncio.sleep(1)
            asyncio.get_running_loop().remove_reader(ours)
        return heard

    assert virtual_time.run(main()) == [b"x"]


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
