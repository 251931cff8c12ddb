"""One connection's frames, under virtual time."""

import asyncio

import msgspec
import pytest

from flash.explorer.link import Link, LinkLost
from flash.explorer.messages import FromExplorer, Settled
from flash.virtual_time import in_virtual_time


class Says:
    """A wire on which the other side says this."""

    def __init__(self, *frames):
        self.frames = list(frames)

    async def send(self, frame):
        pass

    async def receive(self):
        if not self.frames:
            await asyncio.Event().wait()
        return self.frames.pop(0)

    async def close(self):
        pass


ENDLESS = ["Told", "x", 0.0, False, False, msgspec.Raw(b"\x91" * 9000)]


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x92\x01",
        msgspec.msgpack.encode([1, [["News", 1, 0, [ENDLESS]]]]),
        b"\x92\x01\x91\x93\xa7Trouble\xa5other\xa1\xff",
    ],
    ids=["nothing", "half of it", "without end", "no text"],
)
@in_virtual_time
async def test_a_frame_that_is_none_ends_the_link_and_nothing_else(frame):
    async with Link(Says(frame), FromExplorer, deadline_s=10) as link:
        with pytest.raises(LinkLost, match="a message that is none"):
            async for _ in link.messages():
                pass


class Stuck:
    """A wire on which the other side speaks, and reads nothing."""

    async def send(self, frame):
        await asyncio.Event().wait()

    async def receive(self):
        await asyncio.Event().wait()

    async def close(self):
        pass


@in_virtual_time
async def test_a_link_whose_other_side_takes_nothing_is_lost():
    async with Link(Stuck(), FromExplorer, deadline_s=10) as link:
        link.send(Settled([1]))
        with pytest.raises(LinkLost, match="nothing was taken for 10 s"):
            async with asyncio.timeout(60):
                async for _ in link.messages():
                    pass
