"""What is given up when somebody asks to stop."""

import asyncio

import pytest

from flash.stop import given_up_by
from flash.virtual_time import in_virtual_time


@in_virtual_time
async def test_what_is_opened_is_given_up_when_a_stop_is_asked_for():
    stop, closed = asyncio.Event(), False
    asyncio.get_running_loop().call_later(5, stop.set)
    async with given_up_by(stop):
        try:
            await asyncio.sleep(1000)
        finally:
            closed = True
            await asyncio.sleep(1)  # what closes has its time
    assert closed
    assert asyncio.get_running_loop().time() == 6


@in_virtual_time
async def test_what_is_open_is_not_given_up():
    stop = asyncio.Event()
    async with given_up_by(stop) as opening:
        opening.is_over()
        stop.set()
        await asyncio.sleep(1)
        done = True
    assert done


@in_virtual_time
async def test_an_error_of_what_is_opened_stays_what_it_is():
    for error in (TimeoutError("its own"), ValueError("no such model"), asyncio.CancelledError()):
        with pytest.raises(type(error)) as caught:
            async with given_up_by(asyncio.Event()):
                raise error
        assert str(caught.value) == str(error)
