"""A run whose episodes are played by explorers, which come, go, and are lost."""

import asyncio

import pytest

from flash.fakes import FakeWires, KeepingObserver
from flash.virtual_time import in_virtual_time
from tests.explorer.fleets import Controller, Explorer
from tests.steady import weights


async def train(loop, versions):
    for version in versions:
        batch = await loop.next_batch()
        assert batch.metrics["staleness/max"] <= loop.alpha
        await loop.publish(weights(version))


@in_virtual_time
async def test_explorers_play_a_run():
    wires = FakeWires()
    kept = KeepingObserver()
    controller = Controller(wires, observers=[kept])
    async with controller.running() as loop:
        explorers = [Explorer(wires, name).start() for name in "ab"]
        await train(loop, range(1, 6))
        assert {e.played > 0 for e in controller.fleet.explorers.values()} == {True}
    await asyncio.wait([e.task for e in explorers], timeout=60)
    assert all(e.task.done() for e in explorers)
    assert loop.ledger.count("trained") == 40
    loop.ledger.check()
