"""One connection's frames, under virtual time."""

import asyncio
import itertools

import msgspec
import pytest

from flash.explorer.link import Link, LinkLost
from flash.explorer.messages import FromExplorer, Settled, encoder
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


class Late(Stuck):
    """One on which nothing comes before a time, and then a frame each second."""

    def __init__(self, first_at: float) -> None:
        self._next_at = first_at
        self._numbers = itertools.count(1)

    async def send(self, frame):
        pass

    async def receive(self):
        await asyncio.sleep(self._next_at - asyncio.get_running_loop().time())
        self._next_at += 1
        return encoder.encode([next(self._numbers), []])


@in_virtual_time
async def test_what_waits_to_be_read_when_the_deadline_is_over_is_heard():
    async with Link(Late(10.001), FromExplorer, deadline_s=10) as link:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(60):
                async for _ in link.messages():
                    pass


class Silent(Stuck):
    """One whose other side does not answer that it closes."""

    async def send(self, frame):
        pass

    async def close(self):
        await asyncio.Event().wait()


@in_virtual_time
async def test_who_left_a_link_on_which_nothing_passes_is_free_at_once():
    clock = asyncio.get_running_loop().time
    with pytest.raises(LinkLost):
        async with Link(Silent(), FromExplorer, deadline_s=10) as link:
            async for _ in link.messages():
                pass
    assert clock() == pytest.approx(10, abs=0.1)


@in_virtual_time
async def test_who_closes_a_link_does_not_wait_long_for_the_other_side_to_do_so():
    clock = asyncio.get_running_loop().time
    async with Link(Silent(), FromExplorer, deadline_s=10):
        pass
    assert 0 < clock() <= 5


class Keeps:
    """A wire that keeps what it is given, and when."""

    def __init__(self):
        self.frames = []

    async def send(self, frame):
        _, messages = msgspec.msgpack.decode(frame)
        self.frames.append((asyncio.get_running_loop().time(), [m[1] for m in messages]))

    async def receive(self):
        await asyncio.Event().wait()

    async def close(self):
        pass


@in_virtual_time
async def test_what_may_wait_goes_with_what_may_not_or_by_itself():
    wire = Keeps()
    async with Link(wire, FromExplorer, deadline_s=10) as link:
        for number in range(10):
            link.send(Settled([number]), soon=False)
            await asyncio.sleep(0.001)
        link.send(Settled([10]))
        await asyncio.sleep(0.01)
        assert [said for _, said in wire.frames] == [[[n] for n in range(11)]]
        link.send(Settled([11]), soon=False)
        await asyncio.sleep(1)
        at, said = wire.frames[1]
        assert said == [[11]]
        assert at < 0.1


@in_virtual_time
async def test_who_reads_can_be_cancelled_by_others():
    async def read():
        async with Link(Keeps(), FromExplorer, deadline_s=10) as link:
            async for _ in link.messages():
                pass

    reading = asyncio.create_task(read())
    await asyncio.sleep(1)
    reading.cancel()
    await asyncio.wait([reading])
    assert reading.cancelled()
