"""Workers that take turns with the trainer on the GPUs they share, under virtual time."""

import asyncio
import contextlib
from dataclasses import replace
from pathlib import Path

import pytest

from flash.errors import InferenceFailure, PublishFailure
from flash.fakes import FakePool, FakeWorker
from flash.hub.hub import InferenceHub
from flash.hub.worker import BadRequest, WorkerFailure
from flash.virtual_time import in_virtual_time
from tests.steady import now, request, steady, weights

FIRST = weights(0)


def hub_over(pool, **more) -> InferenceHub:
    return InferenceHub(pool, **({"weights": FIRST, "recovery_timeout_s": 600} | more))


def memory(workers: list[FakeWorker]) -> list[bool]:
    return [worker.has_memory for worker in workers]


async def until_healthy(hub: InferenceHub) -> None:
    while not all(worker.healthy for worker in hub.stats().workers):
        await asyncio.sleep(1)


@in_virtual_time
async def test_workers_have_no_memory_in_the_trainers_turn_and_requests_go_on_after_it():
    workers = [steady("a"), steady("b")]
    async with hub_over(FakePool(workers)) as hub:
        calls = [asyncio.ensure_future(hub.generate(request(10))) for _ in range(2)]
        await asyncio.sleep(3.5)
        async with hub.asleep():
            assert memory(workers) == [False, False]
            late = asyncio.ensure_future(hub.generate(request(1)))
            await asyncio.sleep(100)
            assert not late.done()
        assert memory(workers) == [True, True]
        for answer in await asyncio.gather(*calls):
            assert answer.versions == [0] * 10
        assert (await late).versions == [0]
        assert hub.stats().retries == 0
        assert sum(len(worker.started) for worker in workers) == 3


@in_virtual_time
async def test_a_publish_in_the_trainers_turn_wakes_workers_with_the_new_weights_alone():
    workers = [steady("a"), steady("b")]
    async with hub_over(FakePool(workers)) as hub:
        call = asyncio.ensure_future(hub.generate(request(10)))
        await asyncio.sleep(3.5)
        async with hub.asleep():
            await asyncio.sleep(50)
            report = await hub.publish(weights(1))
            assert memory(workers) == [True, True]
            assert report.workers == 2
            assert report.paused_s == 2  # a load each: what they slept was the trainer's
        assert (await call).versions == [0, 0, 0] + [1] * 7
        for worker in workers:  # the first are those of the hub's start
            assert worker.loaded == [Path("/fake/0"), Path("/fake/1")]


@pytest.mark.parametrize("mode", ["keep", "abort", "wait"])
@in_virtual_time
async def test_what_sleep_does_to_requests_is_what_a_publish_does(mode):
    expected = {"keep": [0] * 3 + [1] * 7, "abort": [0] * 3 + [1] * 7, "wait": [0] * 10}
    async with hub_over(FakePool([steady()]), update_mode=mode) as hub:
        call = asyncio.ensure_future(hub.generate(request(10)))
        await asyncio.sleep(3.5)
        async with hub.asleep():
            assert now() == pytest.approx(11 if mode == "wait" else 4.5)
            await hub.publish(weights(1))
        assert (await call).versions == expected[mode]


@in_virtual_time
async def test_no_deadline_passes_while_workers_sleep():
    """Neither that of an answer nor that of the next tokens."""
    pool = FakePool([steady(tell_s=1)])
    async with hub_over(pool, request_timeout_s=12, progress_timeout_s=5) as hub:
        call = asyncio.ensure_future(hub.generate(request(10)))
        await asyncio.sleep(3.5)
        for _ in range(2):
            async with hub.asleep():
                await asyncio.sleep(1000)
        assert len((await call).token_ids) == 10
        assert pool.deaths == hub.stats().retries == 0
        slow = asyncio.ensure_future(hub.generate(request(14)))
        await asyncio.sleep(2)
        async with hub.asleep():
            await asyncio.sleep(1000)
        began = now()
        while not hub.stats().retries:
            await asyncio.sleep(0.5)
        assert now() - began == pytest.approx(10, abs=1.5)  # what was left of 12, not of 1012
        slow.cancel()


@in_virtual_time
async def test_sleep_is_not_counted_as_work():
    async with hub_over(FakePool([steady()])) as hub:
        call = asyncio.ensure_future(hub.generate(request(10)))
        await asyncio.sleep(3)
        async with hub.asleep():
            assert hub.stats().workers[0].asleep
            await asyncio.sleep(100)
            assert hub.stats().workers[0].busy_s == 3
        await call
        assert hub.stats().workers[0].busy_s == pytest.approx(10)


@in_virtual_time
async def test_blocks_may_be_nested_and_the_outermost_wakes():
    worker = steady()
    async with hub_over(FakePool([worker])) as hub:
        async with hub.asleep():
            async with hub.asleep():
                assert not worker.has_memory
            assert not worker.has_memory
            await hub.publish(weights(1))
            async with hub.asleep():  # ranks that die as they score
                assert not worker.has_memory
            assert worker.has_memory
        assert worker.has_memory


@in_virtual_time
async def test_room_is_made_before_workers_start_and_before_they_wake():
    worker = steady()
    made: list[bool] = []

    class Pool(FakePool):
        async def start(self, on_exit, on_ready):
            assert made == [True]
            return await super().start(on_exit, on_ready)

    async def make_room():
        made.append(worker.has_memory)

    pool = Pool([worker])
    async with hub_over(pool, make_room=make_room) as hub, hub.asleep():
        await hub.publish(weights(1))
    assert made == [True, False]


@in_virtual_time
async def test_a_worker_that_dies_in_its_sleep_is_started_in_the_workers_turn_and_loses_nothing():
    dying, other = workers = [steady("a"), steady("b")]
    pool = FakePool(workers, start_s=30)
    async with hub_over(pool, recovery_timeout_s=60) as hub:
        calls = [asyncio.ensure_future(hub.generate(request(10))) for _ in range(2)]
        await asyncio.sleep(3.5)
        async with hub.asleep():
            pool.kill(dying)
            pool.kill(other)
            await asyncio.sleep(1000)  # longer than the pool may be without a healthy worker
            assert memory(workers) == [False, False]
            await hub.publish(weights(1))
        for answer in await asyncio.gather(*calls):
            assert len(answer.token_ids) == 10
            assert answer.versions[-1] == 1
        assert dying.loaded[-1] == other.loaded[-1] == Path("/fake/1")


@in_virtual_time
async def test_a_worker_whose_connection_breaks_in_its_sleep_is_started_anew():
    """It has no weights; a load at its health check would be into memory that is not there."""

    class Breaking(FakeWorker):
        async def generate(self, *args):
            if self.started:
                return await super().generate(*args)
            self.started.append("")
            await asyncio.sleep(10)
            raise WorkerFailure("the connection broke")

    worker = steady(kind=Breaking)
    pool = FakePool([worker], start_s=30)
    async with hub_over(pool) as hub:
        call = asyncio.ensure_future(hub.generate(request(3)))
        await asyncio.sleep(1)
        async with hub.asleep():
            await asyncio.sleep(100)
            assert pool.deaths == 1
            assert not worker.has_memory
        assert len((await call).token_ids) == 3
        assert pool.deaths == 1


@in_virtual_time
async def test_a_worker_that_does_not_fall_asleep_has_no_process_in_the_trainers_turn():
    class Sleepless(FakeWorker):
        async def sleep(self, mode):
            await asyncio.Event().wait()

    bad, _ = workers = [steady("a", kind=Sleepless), steady("b")]
    pool = FakePool(workers, start_s=30)
    async with hub_over(pool, control_timeout_s=20) as hub:
        calls = [asyncio.ensure_future(hub.generate(request(10))) for _ in range(2)]
        await asyncio.sleep(3.5)
        async with hub.asleep():
            assert memory(workers) == [False, False]
            assert pool.deaths == 1
            await asyncio.sleep(100)
            assert bad.dead  # not started yet
        assert {len(answer.token_ids) for answer in await asyncio.gather(*calls)} == {10}
        await until_healthy(hub)
        assert not bad.dead


@in_virtual_time
async def test_a_worker_that_does_not_wake_is_started_anew():
    class Sleepy(FakeWorker):
        async def wake_rest(self):
            raise WorkerFailure("out of memory")

    bad, good = workers = [steady("a", kind=Sleepy), steady("b")]
    pool = FakePool(workers, start_s=30)
    async with hub_over(pool) as hub:
        calls = [asyncio.ensure_future(hub.generate(request(10))) for _ in range(2)]
        await asyncio.sleep(3.5)
        async with hub.asleep():
            report = await hub.publish(weights(1))
            assert report.workers == 1
        answers = await asyncio.gather(*calls)
        assert {answer.worker for answer in answers} == {"b"}
        assert {len(answer.token_ids) for answer in answers} == {10}
        assert pool.deaths == 1
        await until_healthy(hub)
        assert bad.loaded[-1] == good.loaded[-1] == Path("/fake/1")


@in_virtual_time
async def test_sleep_waits_for_a_worker_that_is_being_started():
    starting, _ = workers = [steady("a"), steady("b")]
    pool = FakePool(workers, start_s=30)
    async with hub_over(pool) as hub:
        call = asyncio.ensure_future(hub.generate(request(60)))
        pool.kill(starting)
        await asyncio.sleep(3)
        began = now()
        async with hub.asleep():
            assert now() - began > 25
            assert not starting.dead
            assert memory(workers) == [False, False]
        assert len((await call).token_ids) == 60


@in_virtual_time
async def test_sleep_does_not_wait_for_ever_for_a_worker_that_does_not_come_back():
    class Sick(FakeWorker):
        async def check_health(self):
            raise WorkerFailure("sick")

    sick, _ = workers = [steady("a", kind=Sick), steady("b")]
    pool = FakePool(workers, start_s=1)
    async with hub_over(pool, recovery_timeout_s=200) as hub:
        pool.kill(sick)
        await asyncio.sleep(3)
        began = now()
        async with hub.asleep():
            assert now() - began == 200
            assert memory(workers) == [False, False]
            await asyncio.sleep(100)
            assert memory(workers) == [False, False]
        assert (await hub.generate(request(1))).worker == "b"


@in_virtual_time
async def test_a_worker_that_is_out_is_not_brought_back_in_the_trainers_turn():
    """One that runs without a pool may get well at any time."""

    class Sick(FakeWorker):
        well = False

        async def check_health(self):
            if not self.well:
                raise WorkerFailure("sick")

    sick = steady("a", kind=Sick)
    async with hub_over([sick, steady("b")], recovery_timeout_s=50) as hub:
        hub.give_up("a", "for this test")
        async with hub.asleep():
            sick.well = True
            await asyncio.sleep(100)
            assert sick.loaded == [Path("/fake/0")]
        await until_healthy(hub)
        assert sick.loaded == [Path("/fake/0")] * 2


@in_virtual_time
async def test_weights_that_do_not_fit_end_a_publish_to_workers_that_sleep():
    class Refusing(FakeWorker):
        async def load_weights(self, weights):
            if weights.version:
                raise BadRequest("no such layer")
            await super().load_weights(weights)

    async with hub_over(FakePool([steady(kind=Refusing)])) as hub, hub.asleep():
        with pytest.raises(PublishFailure, match="no such layer"):
            await hub.publish(weights(1))


@in_virtual_time
async def test_a_block_that_raises_leaves_workers_asleep():
    worker = steady()
    async with hub_over(FakePool([worker])) as hub:
        with pytest.raises(RuntimeError):
            async with hub.asleep():
                raise RuntimeError("the trainer failed")
        assert not worker.has_memory


@in_virtual_time
async def test_a_hub_that_has_ended_has_nobody_to_put_to_sleep():
    worker = steady()
    async with hub_over(FakePool([worker])) as hub:
        pass
    async with hub.asleep():
        assert worker.has_memory  # a pool of processes has none by then


@in_virtual_time
async def test_a_pool_whose_last_worker_dies_for_good_in_its_sleep_ends_the_run():
    worker = steady()
    pool = FakePool([worker], lives=1)
    async with hub_over(pool) as hub:
        call = asyncio.ensure_future(hub.generate(request(10)))
        await asyncio.sleep(1)
        async with hub.asleep():
            pool.kill(worker)
            with pytest.raises(InferenceFailure, match="was killed"):
                await hub.publish(weights(1))
        with pytest.raises(InferenceFailure):
            await call


@in_virtual_time
async def test_what_has_no_weights_to_wake_with_does_not_sleep():
    async with InferenceHub(FakePool([steady()])) as hub:
        with pytest.raises(ValueError, match="give the hub those"):
            async with hub.asleep():
                pass


@in_virtual_time
async def test_lent_workers_do_not_sleep():
    async with hub_over(FakePool([steady("a"), steady("b")])) as hub, hub.lend(1):
        with pytest.raises(ValueError, match="end the loan first"):
            async with hub.asleep():
                pass


@in_virtual_time
async def test_workers_are_probed_once_they_are_awake():
    worker = steady()
    scored: list[bool] = []

    async def score(token_ids):
        scored.append(worker.has_memory)
        return [-0.5] * (len(token_ids) - 1)

    async with hub_over(FakePool([worker])) as hub, hub.asleep():
        with pytest.raises(PublishFailure, match="gap|logits"):
            await hub.publish(weights(1, score))
    assert set(scored) == {True}


@in_virtual_time
async def test_ranks_that_need_the_gpus_to_answer_a_probe_get_them():
    """The trainer takes its turn in the middle of a publish."""
    worker = steady()
    had: list[bool] = []

    async def score(token_ids):
        async with hub.asleep():
            had.append(worker.has_memory)
        raise RuntimeError("enough is seen")

    async with hub_over(FakePool([worker])) as hub, hub.asleep():
        with pytest.raises(RuntimeError, match="enough"):
            await hub.publish(weights(1, score))
        assert had == [False]
        assert worker.has_memory
        assert worker.version == 1


@in_virtual_time
async def test_the_trainers_memory_is_free_again_before_workers_take_the_rest_of_theirs():
    """It is shared once for all of them, while they load."""
    events: list[str] = []

    class Telling(FakeWorker):
        async def load_weights(self, weights):
            await super().load_weights(weights)
            events.append(f"{self.name} loads {weights.shared}")

        async def wake_rest(self):
            await super().wake_rest()
            events.append(f"{self.name} wakes")

    @contextlib.asynccontextmanager
    async def share():
        events.append("shared")
        yield Path("/memory")
        events.append("free")

    workers = [steady("a", kind=Telling), steady("b", kind=Telling, load_s=(5, 5))]
    async with hub_over(FakePool(workers)) as hub, hub.asleep():
        events.clear()
        await hub.publish(replace(weights(1), share=share))
    wakes = {"a wakes", "b wakes"}
    assert events[:4] == ["shared", "a loads /memory", "b loads /memory", "free"]
    assert {*events[4:]} == wakes
