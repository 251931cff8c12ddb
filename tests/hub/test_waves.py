"""New weights on their way to many workers: how many are out at a time, and what goes wrong."""

import asyncio
import math
from dataclasses import replace

import pytest

from flash.errors import PublishFailure
from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub
from flash.hub.slot import Slot
from flash.hub.waves import Waves, each, loads_in_a_row
from flash.hub.worker import BadRequest
from flash.types import Scores
from flash.virtual_time import in_virtual_time
from tests.steady import now, request, steady, weights


class Disk:
    """What `Reading` workers read their weights from."""

    def __init__(self, readers: float = math.inf) -> None:
        self.readers = readers  # so many at a time, at full speed
        self.reading = 0
        self.most_reading = 0


class Reading(FakeWorker):
    """Loads in a second, and slower if others read more than its disk bears."""

    disk: Disk

    async def load_weights(self, weights):
        disk = self.disk
        disk.reading += 1
        disk.most_reading = max(disk.most_reading, disk.reading)
        left_s = 1.0
        while left_s > 1e-6:
            speed = min(1, disk.readers / disk.reading)
            await asyncio.sleep(0.1)
            left_s -= 0.1 * speed
        disk.reading -= 1
        self.loaded.append(weights.path)


def reading(count: int, disk: Disk) -> list[FakeWorker]:
    workers = [steady(f"w{number}", Reading) for number in range(count)]
    for worker in workers:
        worker.disk = disk
    return workers


async def published(hub: InferenceHub, version: int) -> float:
    """How long that took."""
    began = now()
    await hub.publish(weights(version))
    return round(now() - began, 6)


@pytest.mark.parametrize(
    ("count", "first", "later"), [(1, 1, 1), (2, 2, 2), (3, 3, 3), (24, 5, 2), (500, 9, 2)]
)
@in_virtual_time
async def test_a_publish_takes_a_few_loads_however_many_workers_there_are(count, first, later):
    """A load takes a second; at first it is not known how many loads at a time are quick."""
    workers = [steady(f"w{number}") for number in range(count)]
    async with InferenceHub(workers) as hub:
        assert await published(hub, 1) == first
        assert await published(hub, 2) == await published(hub, 3) == later
        assert loads_in_a_row(count) == later
        assert {worker.version for worker in workers} == {3}


@in_virtual_time
async def test_half_of_the_workers_that_are_well_go_on_sampling():
    disk = Disk()
    workers = reading(12, disk)
    for worker in workers[:4]:
        worker.die()
    async with InferenceHub(workers) as hub:
        for version in range(1, 5):
            await hub.publish(weights(version))
        assert disk.most_reading == 4
        publishing = asyncio.ensure_future(hub.publish(weights(5)))
        await asyncio.sleep(0.5)
        accepting = [w.healthy and not w.updating for w in hub.stats().workers]
        assert accepting.count(True) == 4
        await publishing


@pytest.mark.parametrize(("readers", "at_a_time"), [(1, 2), (4, 8)])
@in_virtual_time
async def test_loads_that_slow_one_another_are_made_a_few_at_a_time(readers, at_a_time):
    """Now and then one wave tries whether twice as many would be as quick."""
    disk, most_reading = Disk(readers), []
    async with InferenceHub(reading(32, disk)) as hub:
        for version in range(1, 11):
            disk.most_reading = 0
            took_s = await published(hub, version)
            most_reading.append(disk.most_reading)
            assert took_s <= 32 / readers + 4, "no slower than the disk is"
        assert max(most_reading) == at_a_time
        assert hub.stats().paused_s / (10 * 32) < 1.4, "a load alone takes a second"


@in_virtual_time
async def test_a_disk_that_has_become_quick_is_noticed():
    disk = Disk(readers=1)
    async with InferenceHub(reading(32, disk)) as hub:
        await hub.publish(weights(1))
        disk.readers = math.inf
        await hub.publish(weights(2))
        disk.most_reading = 0
        assert await published(hub, 3) == 2
        assert disk.most_reading == 16


@in_virtual_time
async def test_one_slow_worker_does_not_make_the_others_wait():
    workers = [steady(f"w{number}") for number in range(15)] + [steady("slow", load_s=(30, 30))]
    async with InferenceHub(workers) as hub:
        await hub.publish(weights(1))
        assert await published(hub, 2) == await published(hub, 3) == 31
        slow = asyncio.ensure_future(hub.publish(weights(4)))
        await asyncio.sleep(3)
        assert sum(worker.updating for worker in hub.stats().workers) == 1
        await slow


@in_virtual_time
async def test_the_least_busy_workers_are_first():
    order = []

    class Noting(FakeWorker):
        async def load_weights(self, weights):
            order.append(self.name)
            await super().load_weights(weights)

    workers = [steady(name, Noting) for name in "abc"]
    async with InferenceHub(workers) as hub:
        sizes = {"a": 30, "b": 10, "c": 20}
        calls = [asyncio.ensure_future(hub.generate(request(size))) for size in sizes.values()]
        await asyncio.sleep(0.5)
        await hub.publish(weights(1))
        assert order == ["b", "c", "a"]
        await asyncio.gather(*calls)


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_of_weights_that_do_not_fit_those_under_way_are_loaded_and_no_others():
    class Refusing(FakeWorker):
        async def load_weights(self, weights):
            await asyncio.sleep(0.5)
            if weights.path.name == "4":
                raise BadRequest("lacks weights of this model")

    workers = [steady(f"w{n}", Refusing if n == 1 else FakeWorker) for n in range(8)]
    async with InferenceHub(workers) as hub:
        for version in (1, 2, 3):
            await hub.publish(weights(version))
        with pytest.raises(PublishFailure, match="version 4: lacks weights"):
            await hub.publish(weights(4))
        assert [worker.version for worker in workers] == [4, 3, 4, 4, 3, 3, 3, 3]
        assert [w.healthy for w in hub.stats().workers] == [n != 1 for n in range(8)]
        assert not any(worker.updating for worker in hub.stats().workers)
        assert hub.version == 3
        answers = await asyncio.gather(*(hub.generate(request()) for _ in range(7)))
        assert len({answer.worker for answer in answers}) == 7, "they all go on"


@in_virtual_time
async def test_a_publish_that_is_cancelled_in_a_wave_excludes_that_wave_until_it_has_the_weights():
    workers = [steady(f"w{number}") for number in range(8)]
    async with InferenceHub(workers) as hub:
        for version in (1, 2, 3):
            await hub.publish(weights(version))
        publishing = asyncio.ensure_future(hub.publish(weights(4)))
        await asyncio.sleep(0.5)
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        assert publishing.cancelled()
        assert [w.healthy for w in hub.stats().workers] == [False] * 4 + [True] * 4
        assert [worker.version for worker in hub.stats().workers] == [3] * 8
        await asyncio.sleep(10)
        assert [worker.version for worker in workers] == [4] * 4 + [3] * 4
        await hub.publish(weights(4))
        assert {worker.version for worker in hub.stats().workers} == {4}


@in_virtual_time
async def test_workers_that_fail_in_a_wave_cost_the_others_nothing():
    workers = [steady(f"w{number}") for number in range(12)]
    async with InferenceHub(workers) as hub:
        for version in (1, 2, 3, 4):
            await hub.publish(weights(version))
        for worker in workers[::5]:
            worker.die()
        report = await hub.publish(weights(5))
        assert [worker.updated for worker in report.per_worker] == [n % 5 != 0 for n in range(12)]
        assert report.paused_s == 9


@in_virtual_time
async def test_what_nobody_expected_ends_the_wave_and_says_so():
    class Wrong(FakeWorker):
        async def load_weights(self, weights):
            raise ZeroDivisionError("a bug")

    workers = [steady("wrong", Wrong), *(steady(f"w{number}") for number in range(3))]
    async with InferenceHub(workers) as hub:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            await hub.publish(weights(1))


# ── probe, lend ──────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_all_workers_are_probed_at_the_same_time_and_scored_at_once():
    workers = [steady(f"w{number}", load_s=(0, 0)) for number in range(40)]
    for worker in workers:
        for _ in range(8):
            worker.lie_next(logprobs=[-0.5] * 16)
    scored = []

    async def score(sequences):
        scored.append(len(sequences))
        return Scores(logprobs=[[-0.5] * (len(tokens) - 1) for tokens in sequences])

    async with InferenceHub(workers) as hub:
        gap = await hub.probe(replace(weights(0), score=score))
        assert (gap.tokens, gap.max) == (128, 0)
        assert (now(), scored) == (16, [320]), "as long as one answer takes"


@in_virtual_time
async def test_lent_workers_come_back_together():
    workers = [steady(f"w{number}") for number in range(24)]
    async with InferenceHub(workers) as hub:
        for version in (1, 2, 3):
            await hub.publish(weights(version))
        async with hub.lend(8):
            await hub.publish(weights(4))
        await asyncio.sleep(0)
        assert await published(hub, 5) == 1 + 2, "it waits until they are back"
        assert {worker.version for worker in workers} == {5}
        assert all(worker.loaded[-1].name == "5" for worker in workers)


# ── alone ────────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_hundreds_of_turns_do_not_begin_in_one_turn_of_the_event_loop():
    begun, most = 0, 0

    async def turn(slot):
        nonlocal begun
        begun += 1
        await asyncio.sleep(1)

    async def watch():
        nonlocal most
        last = 0
        while begun < 100:
            await asyncio.sleep(0)
            most, last = max(most, begun - last), begun

    slots = [Slot(steady(f"w{number}"), 0) for number in range(100)]
    await asyncio.gather(each(slots, turn), watch())
    assert 0 < most <= 32


@in_virtual_time
async def test_turns_without_a_load_teach_nothing():
    waves, most, out = Waves(), 0, 0

    async def load(slot):
        nonlocal most, out
        out += 1
        most = max(most, out)
        await asyncio.sleep(1)
        out -= 1

    await waves.over([Slot(steady(f"w{number}"), 0) for number in range(8)], load, most_out=4)
    assert (now(), most) == (8, 1)
