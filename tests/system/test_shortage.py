"""What the machine lacks is waited for; what else fails is told at once."""

import asyncio
import errno

import pytest

from flash.system.shortage import when_there_is_room
from flash.virtual_time import in_virtual_time


class Attempts:
    """Fails so many times with that error."""

    def __init__(self, number: int, times: int) -> None:
        self.number = number
        self.left = times
        self.made = 0

    async def __call__(self) -> str:
        self.made += 1
        if self.made <= self.left:
            raise OSError(self.number, "lacking")
        return "done"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM])
@in_virtual_time
async def test_what_is_lacking_for_a_while_is_waited_for(number):
    attempts = Attempts(number, times=10)
    assert await when_there_is_room(attempts) == "done"
    assert attempts.made == 11
    assert asyncio.get_running_loop().time() < 20


@in_virtual_time
async def test_another_error_is_told_at_once():
    attempts = Attempts(errno.ECONNREFUSED, times=1)
    with pytest.raises(ConnectionRefusedError):
        await when_there_is_room(attempts)
    assert attempts.made == 1


@in_virtual_time
async def test_what_is_lacking_for_longer_than_it_may_be_is_told():
    with pytest.raises(OSError, match="lacking"):
        await when_there_is_room(Attempts(errno.EMFILE, times=1000), within_s=60)
    assert 60 <= asyncio.get_running_loop().time() < 65
