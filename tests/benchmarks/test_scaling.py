"""benchmarks/scaling.py: two processes with one clock."""

import asyncio
import multiprocessing

import pytest
from scaling import FRAME_S, Case, SharedClockLoop, in_two_processes


class OtherSide:
    """Has sent this before this side begins, and then is always an hour ahead."""

    def __init__(self, *frames: bytes) -> None:
        self.heard: list[bytes] = []
        self._sends = [(0.0, [(FRAME_S, 0, frame) for frame in frames])]

    def send(self, told) -> None:
        _, sent = told
        self.heard += [frame for _, _, frame in sent]

    def recv(self):
        return self._sends.pop() if self._sends else (3600.0, [])


def test_what_one_side_sends_before_the_other_has_begun_arrives():
    async def replies() -> tuple[float, bytes]:
        (wire,) = loop.wires
        frame = await wire.receive()
        arrived_at = loop.time()
        await wire.send(b"\x92\x00\x91\x01")
        await asyncio.sleep(2 * FRAME_S)
        return arrived_at, frame

    other = OtherSide(b"\x92\x00\x90")
    loop = SharedClockLoop(other, wires=1, works=False)
    try:
        assert loop.run_until_complete(replies()) == (FRAME_S, b"\x92\x00\x90")
    finally:
        loop.close()
    assert other.heard == [b"\x92\x00\x91\x01"]
    (wire,) = loop.wires
    assert wire.counts == {
        "frames": 2, "bytes received": 3, "messages received": 0, "bytes sent": 4,
        "messages sent": 1,
    }  # fmt: skip


@pytest.mark.slow
def test_a_case_is_measured_in_two_processes_which_end():
    row = in_two_processes(Case(explorers=2, in_flight=64, batches=1))
    assert min(row["episodes_per_s"], row["messages_sent"], row["messages_received"]) > 0
    assert multiprocessing.active_children() == []
