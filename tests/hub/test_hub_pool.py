"""The hub and a pool that starts its workers anew, under virtual time."""

import asyncio
import math
from pathlib import Path

import pytest

from flash.errors import InferenceFailure
from flash.fakes import FakePool, FakeWorker
from flash.hub.hub import InferenceHub
from flash.hub.worker import WeightsGone, WorkerFailure
from flash.virtual_time import in_virtual_time
from tests.steady import now, request, weights

PROMPT = 5  # tokens of a request's


class Recording(FakeWorker):
    """Samples exactly `max_tokens`, one a second, tells of them, and keeps what it was asked."""

    def __init__(self, name: str, **options) -> None:
        fixed = {"token_s": (1, 1), "tokens": (10**6, 10**6), "load_s": (1, 1), "tell_s": 1.0}
        super().__init__(name, **(fixed | options))
        self.asked: list[tuple[int, int]] = []

    async def generate(self, request_id, token_ids, sampling, on_tokens=None):
        self.asked.append((len(token_ids) - PROMPT, sampling.max_tokens))
        return await super().generate(request_id, token_ids, sampling, on_tokens)


@in_virtual_time
async def test_a_worker_that_died_takes_requests_again_once_it_has_the_present_weights():
    dying, other = workers = [Recording("a"), Recording("b")]
    pool = FakePool(workers, start_s=30)
    async with InferenceHub(pool) as hub:
        pool.kill(dying)
        await hub.publish(weights(1))
        assert dying.loaded == []
        await asyncio.sleep(20)
        assert (await hub.generate(request(1))).worker == "b"
        await asyncio.sleep(40)
        assert dying.loaded == [Path("/fake/1")]
        answers = await asyncio.gather(*(hub.generate(request(5)) for _ in range(4)))
        assert {answer.worker for answer in answers} == {"a", "b"}
        assert {v for answer in answers for v in answer.versions} == {1}
        assert other.loaded == [Path("/fake/1")]


@in_virtual_time
async def test_a_worker_whose_weights_were_replaced_before_it_had_them_is_not_started_anew():
    class Late(Recording):
        async def load_weights(self, weights):
            if weights.version < 3:
                raise WeightsGone(f"there are newer weights than {weights.version}")
            await super().load_weights(weights)

    late, other = workers = [Late("a"), Recording("b")]
    pool = FakePool(workers, start_s=30)
    async with InferenceHub(pool) as hub:
        for version in (1, 2, 3):
            await hub.publish(weights(version))
            await asyncio.sleep(60)
        assert late.loaded == [Path("/fake/3")]
        assert pool.deaths == 0
        assert len(other.loaded) == 3


@in_virtual_time
async def test_a_pool_that_dies_as_a_whole_makes_requests_wait_for_its_return():
    workers = [Recording("a"), Recording("b")]
    pool = FakePool(workers, start_s=30)
    async with InferenceHub(pool, recovery_timeout_s=60) as hub:
        calls = [asyncio.ensure_future(hub.generate(request(50))) for _ in range(4)]
        await asyncio.sleep(10)
        for worker in workers:
            pool.kill(worker)
        answers = await asyncio.gather(*calls)
        assert [len(answer.token_ids) for answer in answers] == [50] * 4
        assert 10 + 30 + 40 <= now() < 10 + 30 + 40 + 2


@in_virtual_time
async def test_a_death_that_is_final_for_all_ends_every_call_with_its_cause():
    workers = [Recording("a"), Recording("b")]
    pool = FakePool(workers, lives=2, start_s=1)
    async with InferenceHub(pool) as hub:
        call = asyncio.ensure_future(hub.generate(request(1000)))
        for _ in range(2):
            await asyncio.sleep(20)
            for worker in workers:
                pool.kill(worker)
        with pytest.raises(InferenceFailure, match="no inference worker is left.*was killed"):
            await call
        assert now() == 40


@in_virtual_time
async def test_what_a_worker_had_told_before_it_died_is_not_sampled_again():
    worker = Recording("a")
    pool = FakePool([worker])
    async with InferenceHub(pool) as hub:
        call = asyncio.ensure_future(hub.generate(request(100)))
        await asyncio.sleep(40.5)
        pool.kill(worker)
        answer = await call
        assert worker.asked == [(0, 100), (40, 60)]
        assert len(answer.token_ids) == len(answer.logprobs) == 100
        assert answer.versions == [0] * 100
        assert answer.finish_reason == "length"


@in_virtual_time
async def test_an_answer_of_which_only_the_end_was_lost_is_whole():
    worker = Recording("a")
    pool = FakePool([worker])
    async with InferenceHub(pool) as hub:
        call = asyncio.ensure_future(hub.generate(request(5)))
        generate = worker.generate

        async def dying(*args):
            await generate(*args)
            raise WorkerFailure("the connection broke off")

        worker.generate = dying
        answer = await call
        assert len(answer.token_ids) == 5
        assert answer.finish_reason == "length"
        assert now() == 5


@in_virtual_time
async def test_only_tokens_whose_version_is_certain_are_kept_of_a_worker_that_died():
    """A stream tells versions at its end; from a publish on they could be either's."""
    worker = Recording("a")
    pool = FakePool([worker])
    async with InferenceHub(pool, update_mode="keep") as hub:
        call = asyncio.ensure_future(hub.generate(request(100)))
        await asyncio.sleep(20.5)
        await hub.publish(weights(1))
        await asyncio.sleep(30)
        pool.kill(worker)
        answer = await call
        kept, rest = worker.asked[1]
        assert 19 <= kept <= 21
        assert rest == 100 - kept
        assert answer.versions == [0] * kept + [1] * rest


@in_virtual_time
async def test_nothing_is_kept_of_a_worker_that_told_nonsense():
    worker = Recording("a")
    pool = FakePool([worker], start_s=1)
    async with InferenceHub(pool) as hub:
        worker.lie_next(logprobs=[math.nan] * 10)
        answer = await hub.generate(request(10))
        assert worker.asked == [(0, 10), (0, 10)]
        assert len(answer.token_ids) == 10
        assert pool.deaths == 1, "only a new start helps"


@in_virtual_time
async def test_a_worker_that_brings_no_token_for_long_is_started_anew():
    worker = Recording("a")
    pool = FakePool([worker], start_s=30)
    async with InferenceHub(pool, progress_timeout_s=20) as hub:
        await hub.generate(request(1))  # from which the hub knows that it streams
        call = asyncio.ensure_future(hub.generate(request(100)))
        await asyncio.sleep(50.5)
        worker.hang()
        answer = await call
        assert pool.deaths == 1
        assert worker.asked[1:] == [(0, 100), (50, 50)]
        assert len(answer.token_ids) == 100


@pytest.mark.parametrize("tell_s", [None, 1.0])
@in_virtual_time
async def test_a_worker_that_is_slow_or_paused_is_not_taken_for_one_that_hangs(tell_s):
    worker = Recording("a", tell_s=tell_s, load_s=(50, 50))
    pool = FakePool([worker])
    async with InferenceHub(pool, update_mode="keep", progress_timeout_s=20) as hub:
        await hub.generate(request(1))
        call = asyncio.ensure_future(hub.generate(request(15)))
        await asyncio.sleep(10)
        await hub.publish(weights(1))  # longer than any token may take
        assert len((await call).token_ids) == 15
        if tell_s is None:  # it tells of nothing before all is there
            assert len((await hub.generate(request(100))).token_ids) == 100
        assert pool.deaths == 0


@in_virtual_time
async def test_a_worker_that_stays_unwell_is_started_anew():
    worker = Recording("a")
    pool = FakePool([worker], start_s=5)
    async with InferenceHub(pool) as hub:
        worker.fail_next(4)  # the request, and three health checks
        answer = await hub.generate(request(3))
        assert len(answer.token_ids) == 3
        assert pool.deaths == 1


@in_virtual_time
async def test_the_pool_is_stopped_even_if_a_client_of_its_workers_can_not_be_closed():
    class Unclosable(FakeWorker):
        async def close(self):
            raise OSError("no such socket")

    class Stopped(FakePool):
        stopped = False

        async def stop(self):
            self.stopped = True

    pool = Stopped([Unclosable("a"), FakeWorker("b")])
    with pytest.raises(OSError, match="no such socket"):
        async with InferenceHub(pool):
            pass
    assert pool.stopped
