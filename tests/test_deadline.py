"""Deadlines that share a timer behave as `asyncio.timeout` does."""

import asyncio

import pytest

from flash.deadline import Deadline
from flash.virtual_time import VirtualTimeLoop, in_virtual_time


def now() -> float:
    return asyncio.get_running_loop().time()


async def forever() -> None:
    await asyncio.Event().wait()


@in_virtual_time
async def test_what_takes_too_long_ends_at_the_deadline_and_nothing_else_does():
    ends = {}

    async def call(name: str, begins: float, takes: float) -> None:
        await asyncio.sleep(begins)
        try:
            with Deadline(10) as deadline:
                await asyncio.sleep(takes)
            ends[name] = now(), "done", deadline.expired
        except TimeoutError:
            ends[name] = now(), "late", deadline.expired

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(call("quick", 0, 3))
        tasks.create_task(call("first", 1, 99))
        tasks.create_task(call("in time", 2, 9))
        tasks.create_task(call("second", 2.5, 99))
        tasks.create_task(call("much later", 50, 11))
    assert ends == {
        "quick": (3, "done", False),
        "first": (11, "late", True),
        "in time": (11, "done", False),
        "second": (12.5, "late", True),
        "much later": (60, "late", True),
    }


@in_virtual_time
async def test_of_two_deadlines_within_each_other_the_shorter_one_expires():
    with Deadline(10) as outer:
        with pytest.raises(TimeoutError), Deadline(3) as inner:
            await forever()
        assert (now(), inner.expired, outer.expired) == (3, True, False)
    with pytest.raises(TimeoutError), Deadline(3), Deadline(10) as inner:
        await forever()
    assert (now(), inner.expired) == (6, False)


@in_virtual_time
async def test_a_cancellation_by_another_comes_through_even_in_the_moment_of_the_deadline():
    async def call() -> None:
        with Deadline(10):
            await forever()

    for cancelled_at in (5, 10):
        task = asyncio.create_task(call())
        await asyncio.sleep(cancelled_at)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


@in_virtual_time
async def test_a_timeout_error_from_inside_is_told_from_an_expiry():
    with pytest.raises(TimeoutError, match="theirs"), Deadline(10) as deadline:
        raise TimeoutError("theirs")
    assert not deadline.expired


@in_virtual_time
async def test_the_task_can_be_cancelled_again_after_an_expiry():
    with pytest.raises(TimeoutError), Deadline(10):
        await forever()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await forever()


@in_virtual_time
async def test_one_that_is_to_expire_soon_does_unless_its_block_has_ended():
    with pytest.raises(TimeoutError), Deadline(10) as deadline:
        deadline.expire_soon()
        await forever()
    assert now() == 0
    with Deadline(10) as deadline:
        deadline.expire_soon()
    await asyncio.sleep(20)
    assert not deadline.expired


def test_loops_that_run_in_turn_have_timers_of_their_own():
    async def call(loop: asyncio.AbstractEventLoop) -> str:
        try:
            with Deadline(10):
                await forever()
        except TimeoutError:
            return f"late at {loop.time():g}"
        return "in time"

    loops = [VirtualTimeLoop() for _ in range(2)]
    tasks = []
    for loop in loops:  # each begins before the other's call has ended
        tasks.append(loop.create_task(call(loop)))
        loop.run_until_complete(asyncio.sleep(1))
    ends = [loop.run_until_complete(task) for loop, task in zip(loops, tasks, strict=True)]
    for loop in loops:
        loop.close()
    assert ends == ["late at 10"] * 2


@in_virtual_time
async def test_many_calls_arm_one_timer():
    loop, timers = asyncio.get_running_loop(), []
    call_at = loop.call_at

    def counted(when, callback, *args, **options):
        if callback.__module__ == Deadline.__module__:
            timers.append(when)
        return call_at(when, callback, *args, **options)

    loop.call_at = counted  # type: ignore[method-assign]

    async def call() -> None:
        with Deadline(10):
            await event.wait()

    event = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(100):
            tasks.create_task(call())
        await asyncio.sleep(0)
        event.set()
    await asyncio.sleep(5)
    await call()
    await asyncio.sleep(20)
    assert timers == [10], "nobody is left when it passes"


@in_virtual_time
async def test_one_that_is_stopped_has_as_long_left_when_it_goes_on():
    loop = asyncio.get_running_loop()
    with pytest.raises(TimeoutError), Deadline(10) as deadline:
        for _ in range(2):
            await asyncio.sleep(3)
            deadline.stop()
            await asyncio.sleep(100)
            deadline.go_on()
        await asyncio.sleep(50)
    assert loop.time() == 210
    with Deadline(10) as other:
        other.stop()
        other.go_on()
    await asyncio.sleep(20)
    assert not other.expired
