"""Where the hub could go on for ever, it ends: in time, and with the cause."""

import asyncio
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flash.errors import InferenceFailure
from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub
from flash.hub.worker import WorkerFailure
from flash.types import Completion
from flash.virtual_time import in_virtual_time
from tests.steady import now, request, steady, weights

# ── requests ─────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_a_pool_that_is_healthy_and_answers_nonsense_ends_the_request_with_the_cause():
    workers = [steady("a"), steady("b")]
    for worker in workers:
        for _ in range(100):
            worker.lie_next(logprobs=[math.nan] * 10)
    async with InferenceHub(workers) as hub:
        with pytest.raises(InferenceFailure, match="failed 5 times.*not finite") as caught:
            await hub.generate(request())
        assert isinstance(caught.value.__cause__, WorkerFailure)
        assert sum(len(worker.started) for worker in workers) == 5


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        (None, "does not tell which experts .* start it as docs/engines.md says, or leave trainer"),
        (np.zeros(14, np.int16), r"experts of the shape \[14\], where 14 tokens have some"),
        (np.zeros((15, 2), np.int16), r"experts of the shape \[15, 2\], where 14 tokens have some"),
        (np.zeros((13, 2), np.int16), r"experts of the shape \[13, 2\], where 14 tokens have some"),
    ],
)
@in_virtual_time
async def test_a_worker_that_does_not_tell_experts_that_are_asked_for_is_named(experts, says):
    worker = steady("a")
    for _ in range(100):
        worker.lie_next(experts=experts)
    asked = request()
    asked = replace(asked, sampling=replace(asked.sampling, experts_from=0))
    async with InferenceHub([worker]) as hub:
        with pytest.raises(InferenceFailure, match=says):
            await hub.generate(asked)


@in_virtual_time
async def test_a_request_is_not_blamed_for_workers_that_others_took_out():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers, request_timeout_s=50) as hub:
        patient = asyncio.ensure_future(hub.generate(request(max_tokens=40)))
        for _ in range(12):
            await asyncio.sleep(3)
            for worker in workers:
                worker.fail_next(1)
            await hub.generate(request(max_tokens=1))
        assert len((await patient).token_ids) == 40


@in_virtual_time
async def test_a_worker_that_fails_again_before_it_answered_anything_waits_longer():
    worker = steady("liar")
    tried = []
    for _ in range(5):
        worker.lie_next(versions=[7])
    async with InferenceHub([worker]) as hub:
        with pytest.raises(InferenceFailure):
            await hub.generate(request(max_tokens=1), on_start=lambda _: tried.append(now()))
        gaps = [after - before - 1 for before, after in itertools.pairwise(tried)]
        assert gaps == [0.5, 1, 2, 4], "the second of sampling left out"


@in_virtual_time
async def test_a_worker_that_aborts_what_nobody_asked_it_to_is_not_asked_for_ever():
    class Aborting(FakeWorker):
        async def generate(self, request_id, token_ids, sampling, on_tokens=None):
            self.lie_next(token_ids=[], logprobs=[], versions=[], finish_reason="abort")
            return await super().generate(request_id, token_ids, sampling)

    async with InferenceHub([steady("x", Aborting), steady("y")]) as hub:
        assert (await hub.generate(request())).worker == "y"


@in_virtual_time
async def test_a_place_at_a_worker_that_is_taken_out_in_the_same_moment_is_not_used():
    class Manual(FakeWorker):
        """Answers when it is told to."""

        async def generate(self, request_id, token_ids, sampling, on_tokens=None):
            self.asked = [*getattr(self, "asked", []), asyncio.get_running_loop().create_future()]
            return await self.asked[-1]

    good = Completion(
        token_ids=[1], logprobs=[-1.0], versions=[0], temperature=1.0, finish_reason="stop"
    )

    worker = Manual("manual")
    async with InferenceHub([worker], max_running=2) as hub:
        calls = [asyncio.ensure_future(hub.generate(request())) for _ in range(3)]
        await asyncio.sleep(0.1)
        first, second = worker.asked
        first.set_result(good)  # the third gets this place
        second.set_exception(WorkerFailure("broken"))  # and the worker is out
        await asyncio.sleep(0.1)
        assert len(worker.asked) == 2
        await asyncio.sleep(1)
        for answer in worker.asked[2:]:
            answer.set_result(good)
        await asyncio.gather(*calls)


@in_virtual_time
async def test_a_request_that_lost_its_worker_goes_before_those_that_have_not_begun():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers, max_running=1) as hub:
        order = []

        async def one(number):
            await hub.generate(request())
            order.append(number)

        async with asyncio.TaskGroup() as tasks:
            for number in range(6):
                tasks.create_task(one(number))
            await asyncio.sleep(2)
            workers[0].die()  # it had number 0
        assert order == [1, 0, 2, 3, 4, 5]


@pytest.mark.parametrize("bad", [request(max_tokens=0), request(prompt=0)])
@in_virtual_time
async def test_a_request_that_cannot_be_is_refused_before_any_worker_sees_it(bad):
    worker = steady()
    async with InferenceHub([worker]) as hub:
        with pytest.raises(ValueError, match="needs a prompt and max_tokens of at least 1"):
            await hub.generate(bad)
    assert not worker.started


def test_a_url_in_place_of_a_list_is_told_at_once():
    with pytest.raises(ValueError, match=r"must be a list: \['http://w'\]"):
        InferenceHub("http://w")
    with pytest.raises(ValueError, match="max_running=0"):
        InferenceHub(["http://w"], max_running=0)


# ── versions ─────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_workers_are_told_their_version_at_the_start_and_woken_if_they_were_left_paused():
    workers = [steady("a"), steady("b")]
    await workers[0].pause("keep")
    async with InferenceHub(workers, version=7) as hub:
        assert [worker.version for worker in workers] == [7, 7]
        answers = await asyncio.gather(*(hub.generate(request()) for _ in range(4)))
        assert {answer.worker for answer in answers} == {"a", "b"}
        assert {v for answer in answers for v in answer.versions} == {7}


@in_virtual_time
async def test_a_server_may_start_after_the_hub():
    worker = steady()
    worker.die()
    async with InferenceHub([worker], version=3, recovery_timeout_s=30) as hub:
        asyncio.get_running_loop().call_later(20, worker.restart)
        assert (await hub.generate(request(max_tokens=1))).versions == [3]


@in_virtual_time
async def test_a_server_that_was_started_anew_unnoticed_is_found_by_its_versions():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers) as hub:
        await hub.publish(weights(1))
        await hub.publish(weights(2))
        workers[0].restart(version=1)  # a version that was published, and is not a's
        answers = await asyncio.gather(*(hub.generate(request()) for _ in range(2)))
        assert {v for answer in answers for v in answer.versions} == {2}
        await asyncio.sleep(20)
        assert workers[0].loaded[-1] == Path("/fake/2")
        assert workers[0].version == 2


@in_virtual_time
async def test_versions_that_go_back_are_never_passed_on():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers) as hub:
        call = asyncio.ensure_future(hub.generate(request()))
        await asyncio.sleep(3.5)
        workers[0].lie_next(versions=[1] * 5 + [0] * 5)
        await hub.publish(weights(1))
        assert (await call).worker == "b"
