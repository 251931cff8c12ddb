"""The fake worker has the semantics of a real one, and serves the protocol."""

import asyncio
from pathlib import Path

import pytest
from aiohttp.test_utils import TestServer

from flash import virtual_time
from flash.fakes import FakeWorker, worker_app
from flash.hub.http_worker import HttpWorker
from flash.hub.hub import InferenceHub
from flash.hub.worker import WorkerFailure
from flash.types import GenerateRequest, SamplingParams, Weights
from flash.virtual_time import in_virtual_time

TEN = SamplingParams(max_tokens=10)


def steady(**options) -> FakeWorker:
    return FakeWorker("w", **({"token_s": (1, 1), "tokens": (100, 100)} | options))


def now() -> float:
    return asyncio.get_running_loop().time()


async def start(worker: FakeWorker, request_id: str = "id", sampling=TEN) -> asyncio.Task:
    call = asyncio.ensure_future(worker.generate(request_id, [1, 2], sampling))
    await asyncio.sleep(0)
    return call


@in_virtual_time
async def test_keep_goes_on_where_it_was_with_the_new_version():
    worker = steady()
    call = await start(worker)
    await asyncio.sleep(3.5)
    await worker.pause("keep")
    await asyncio.sleep(100)
    await worker.set_version(1)
    await worker.resume()
    assert (await call).versions == [0] * 3 + [1] * 7
    assert now() == 109.5, "the fourth token was done in the pause"


@in_virtual_time
async def test_an_abort_answers_at_once_with_what_there_is():
    worker = steady()
    call = await start(worker)
    await asyncio.sleep(3.5)
    await worker.abort("id")
    answer = await call
    assert (len(answer.token_ids), answer.finish_reason, now()) == (3, "abort", 3.5)


@in_virtual_time
async def test_the_prompt_takes_its_time_and_a_function_may_say_how_long_a_token_takes():
    worker = steady(first_token_s=(5, 5), token_s=lambda rng: 2.0)
    call = await start(worker)
    await asyncio.sleep(9.5)
    await worker.abort("id")
    assert len((await call).token_ids) == 2
    await worker.generate("other", [1], TEN)
    assert now() == 9.5 + 5 + 20


@in_virtual_time
async def test_those_without_room_wait_inside_in_their_order():
    worker = steady(room=2)
    calls = [await start(worker, str(n)) for n in range(4)]
    await asyncio.gather(*calls)
    assert (worker.started, worker.max_running_seen, now()) == (["0", "1", "2", "3"], 2, 20)


@in_virtual_time
async def test_a_script_says_what_is_sampled_and_goes_on_after_an_abort():
    def count_on(prompt, sampling):
        return range(prompt[-1] + 1, 8)

    worker = steady(script=count_on, load_s=(1, 1))
    async with InferenceHub([worker], update_mode="abort") as hub:
        request = GenerateRequest(token_ids=[0], sampling=SamplingParams(max_tokens=100))
        call = asyncio.ensure_future(hub.generate(request))
        await asyncio.sleep(2.5)
        await hub.publish(Weights(version=1, path=Path("/1")))
        answer = await call
        assert answer.token_ids == [1, 2, 3, 4, 5, 6, 7], "nothing lost, nothing twice"
        assert answer.versions == [0, 0, 1, 1, 1, 1, 1]
        assert answer.finish_reason == "stop"


@pytest.mark.parametrize("state", ["running", "frozen", "hung", "waiting", "draining"])
@in_virtual_time
async def test_those_that_wait_for_a_worker_that_dies_are_told_at_once(state):
    worker = steady(room=1)
    call = await start(worker)
    if state == "frozen":
        await worker.pause("keep")
    elif state == "hung":
        worker.hang()
    elif state == "waiting":
        call = await start(worker, "second")
    elif state == "draining":
        call = asyncio.ensure_future(worker.pause("wait"))
    await asyncio.sleep(0.5)
    worker.die()
    with pytest.raises(WorkerFailure, match="w is dead"):
        await call
    assert now() == 0.5


def test_the_same_seed_does_the_same():
    async def one(seed):
        worker = FakeWorker("w", seed=seed, token_s=(0.1, 2.0), tokens=(1, 50))
        answers = [await worker.generate(str(n), [1], SamplingParams(max_tokens=50)) for n in "ab"]
        return [(a.token_ids, a.logprobs) for a in answers], now()

    assert virtual_time.run(one(1)) == virtual_time.run(one(1)) != virtual_time.run(one(2))


@in_virtual_time
async def test_a_request_costs_a_timer_and_not_one_a_token():
    turns = 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    worker = steady(token_s=(0, 0), tokens=(10**5, 10**5))
    counter = asyncio.ensure_future(count())
    assert len((await worker.generate("id", [1], SamplingParams(max_tokens=10**6))).versions)
    counter.cancel()
    assert turns < 20


async def test_the_hub_over_http_publishes_under_a_request_and_aborts_a_cancelled_one():
    """On the real clock, where nothing is waited for but what happens."""
    worker = FakeWorker("w", token_s=(0.005, 0.005), tokens=(10**6, 10**6), load_s=(0, 0))
    aborted = asyncio.Event()

    class Watched(HttpWorker):
        async def abort(self, request_id):
            await super().abort(request_id)
            aborted.set()

    async with TestServer(worker_app(worker)) as server:
        url = str(server.make_url("/"))
        async with InferenceHub([Watched(url)], version=4) as hub:
            assert worker.version == 4
            request = GenerateRequest(token_ids=[1, 2], sampling=SamplingParams(max_tokens=40))
            started = asyncio.Event()
            call = asyncio.ensure_future(hub.generate(request, lambda _: started.set()))
            await started.wait()
            while not worker.running:
                await asyncio.sleep(0)
            report = await hub.publish(Weights(version=5, path=Path("/weights/5")))
            assert report.workers == 1
            assert worker.loaded == [Path("/weights/5")]
            answer = await call
            assert len(answer.token_ids) == 40
            assert answer.versions[-1] == 5
            assert answer.versions == sorted(answer.versions)
            endless = GenerateRequest(token_ids=[1], sampling=SamplingParams(max_tokens=10**6))
            call = asyncio.ensure_future(hub.generate(endless))
            while not worker.running:
                await asyncio.sleep(0)
            call.cancel()
            await aborted.wait()
            assert worker.aborted == ["generate-tokens-" + worker.started[-1][16:]]
            worker.die()
            hub._supervisor.recovery_timeout_s = 0.05
            with pytest.raises(Exception, match="no inference worker is left.*w is dead"):
                await hub.generate(request)
