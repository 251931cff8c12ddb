"""One connection's frames, under virtual time."""

import asyncio

import pytest

from flash.explorer.link import Link, LinkLost
from flash.explorer.messages import FromExplorer, Settled
from flash.virtual_time import in_virtual_time


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
