"""The hub's promises, under virtual time with fake workers."""

import asyncio
import itertools
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash import virtual_time
from flash.errors import InferenceFailure
from flash.fakes import FakeWorker
from flash.hub.fixed_worker import FixedWorker
from flash.hub.hub import InferenceHub
from flash.hub.worker import BadRequest, WorkerFailure
from flash.types import Completion, GenerateRequest, SamplingParams
from flash.virtual_time import in_virtual_time
from tests.steady import now, request, steady, weights


async def all_ended(tasks) -> list:
    return await asyncio.gather(*tasks, return_exceptions=True)


# ── scheduling ───────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_requests_wait_for_room_first_come_first_served():
    ended = []
    async with InferenceHub([steady()], max_running=2) as hub:

        async def one(number):
            await hub.generate(request())
            ended.append((number, now()))

        await asyncio.gather(*(one(n) for n in range(6)))
    assert [number for number, _ in ended] == list(range(6))
    assert [when for _, when in ended] == [10, 10, 20, 20, 30, 30]


@in_virtual_time
async def test_a_burst_of_requests_begins_in_many_small_turns_of_the_loop_and_at_once():
    worker = steady()
    async with InferenceHub([worker], max_running=1000) as hub:
        calls = [asyncio.ensure_future(hub.generate(request())) for _ in range(500)]
        begun = [0]
        while begun[-1] < 500:
            await asyncio.sleep(0)
            begun.append(len(worker.started))
        assert max(b - a for a, b in itertools.pairwise(begun)) <= 32
        assert now() == 0
        await asyncio.gather(*calls)
        assert now() == 10


@in_virtual_time
async def test_the_worker_with_the_least_outstanding_tokens_gets_the_request():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers) as hub, asyncio.TaskGroup() as tasks:
        tasks.create_task(hub.generate(request(max_tokens=100)))
        for _ in range(3):
            tasks.create_task(hub.generate(request(max_tokens=10)))
        await asyncio.sleep(0.5)
        assert [worker.running for worker in workers] == [1, 3]


@in_virtual_time
async def test_a_later_turn_goes_where_its_prefix_is_unless_that_worker_is_much_busier():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers) as hub, asyncio.TaskGroup() as tasks:
        for session in ("home", "x", "y", "z", "u", "v"):  # one after another, all at a
            assert (await hub.generate(request(session=session))).worker == "a"
        for session in ("x", "y", "z", "u"):
            tasks.create_task(hub.generate(request(max_tokens=100, session=session)))
        await asyncio.sleep(0.5)
        assert [worker.running for worker in workers] == [4, 0]
        assert (await hub.generate(request(session="home"))).worker == "a"
        tasks.create_task(hub.generate(request(max_tokens=100, session="v")))
        await asyncio.sleep(0.5)
        assert [worker.running for worker in workers] == [5, 0]
        assert (await hub.generate(request(session="home"))).worker == "b"


@in_virtual_time
async def test_a_worker_never_has_more_than_max_running_and_a_full_home_is_left():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers, max_running=2) as hub:
        calls = [asyncio.ensure_future(hub.generate(request(session="s"))) for _ in range(6)]
        await asyncio.sleep(0.5)
        assert [worker.running for worker in workers] == [2, 2]
        assert hub.stats().queued == 2
        await asyncio.gather(*calls)
    assert [worker.max_running_seen for worker in workers] == [2, 2]


@in_virtual_time
async def test_sessions_are_forgotten():
    async with InferenceHub([steady()]) as hub:
        for number in range(100):
            await hub.generate(request(max_tokens=1, session=f"s{number}"))
            hub.forget(f"s{number}")
        assert not any(hub.whereabouts(f"s{number}") for number in range(100))


# ── cancellation ─────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_a_cancelled_caller_frees_its_place_and_its_request_is_aborted():
    worker = steady()
    async with InferenceHub([worker], max_running=1) as hub:
        running = asyncio.ensure_future(hub.generate(request(max_tokens=1000)))
        queued = asyncio.ensure_future(hub.generate(request(max_tokens=1000)))
        last = asyncio.ensure_future(hub.generate(request()))
        await asyncio.sleep(5)
        queued.cancel()
        running.cancel()
        await all_ended([running, queued])
        assert now() == 5, "the cancellation waits for nobody"
        await last
        assert now() == 15
    assert worker.aborted == worker.started[:1]


@in_virtual_time
async def test_a_caller_that_is_cancelled_in_the_queue_is_out_of_it_at_once():
    worker = steady()
    async with InferenceHub([worker], max_running=1) as hub:
        running = asyncio.ensure_future(hub.generate(request()))
        queued = [asyncio.ensure_future(hub.generate(request())) for _ in range(3)]
        await asyncio.sleep(1)
        for call in queued[:2]:
            call.cancel()
        await all_ended(queued[:2])
        assert hub.stats().queued == 1
        await asyncio.gather(running, queued[2])
        assert now() == 20
    assert len(worker.started) == 2
    assert not worker.aborted, "what never ran is not aborted"


@in_virtual_time
async def test_a_caller_cancelled_in_the_moment_it_gets_a_place_gives_it_back():
    async with InferenceHub([steady()], max_running=1) as hub:
        first = asyncio.ensure_future(hub.generate(request()))
        second = asyncio.ensure_future(hub.generate(request()))
        await asyncio.sleep(0)
        first.cancel()
        # The place passes to the second in the turn in which the first ends; the second would
        # notice it one turn later.
        while not first.done():
            await asyncio.sleep(0)
        second.cancel()
        for error in await all_ended([first, second]):
            assert isinstance(error, asyncio.CancelledError)
        assert hub.stats().running == 0
        assert hub.stats().workers[0].outstanding_tokens == 0
        await hub.generate(request())


@in_virtual_time
async def test_a_caller_cancelled_in_the_moment_the_pool_fails_is_cancelled():
    async with InferenceHub([steady()], max_running=1) as hub:
        asyncio.get_running_loop().call_later(
            3, hub._supervisor.on_exit, hub._slots[0].worker, "killed", True
        )
        running = asyncio.ensure_future(hub.generate(request()))
        queued = asyncio.ensure_future(hub.generate(request()))
        asyncio.get_running_loop().call_later(3, queued.cancel)
        first, second = await all_ended([running, queued])
        assert isinstance(first, InferenceFailure)
        assert isinstance(second, asyncio.CancelledError)


@in_virtual_time
async def test_an_abort_that_hangs_holds_nobody_up():
    class SlowToAbort(FakeWorker):
        async def abort(self, request_id):
            await asyncio.Event().wait()

    async with InferenceHub([SlowToAbort("w")]) as hub:
        call = asyncio.ensure_future(hub.generate(request(max_tokens=1000)))
        await asyncio.sleep(0.001)
        call.cancel()
        await all_ended([call])
        assert now() == 0.001
    assert now() < 15, "closing waits for the abort's own deadline, no longer"


# ── failing workers ──────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_a_failing_workers_requests_move_to_others():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers) as hub:
        calls = [asyncio.ensure_future(hub.generate(request())) for _ in range(6)]
        await asyncio.sleep(3.5)
        workers[0].die()
        answers = await asyncio.gather(*calls)
        assert {answer.worker for answer in answers} == {"b"}
        assert hub.stats().retries == 3


@in_virtual_time
async def test_a_worker_that_hangs_is_found_by_the_deadline_and_all_it_has_moves_at_once():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers, request_timeout_s=60) as hub:
        first = asyncio.ensure_future(hub.generate(request()))
        await asyncio.sleep(1)
        workers[0].hang()
        other = asyncio.ensure_future(hub.generate(request(max_tokens=10)))
        third = asyncio.ensure_future(hub.generate(request(max_tokens=10)))
        await asyncio.sleep(0.1)
        assert workers[0].running == 2
        await asyncio.gather(first, other, third)
        assert now() < 60 + 11, "the second request at the hung worker did not wait anew"
        workers[0].wake()


@in_virtual_time
async def test_a_worker_comes_back_with_the_present_weights_before_it_takes_requests():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers) as hub:
        workers[0].fail_next(2)
        await hub.generate(request())
        await hub.publish(weights(1))
        await hub.publish(weights(2))
        await asyncio.sleep(60)
        stats = {worker.name: worker for worker in hub.stats().workers}
        assert stats["a"].healthy
        assert workers[0].version == 2
        answers = await asyncio.gather(*(hub.generate(request()) for _ in range(4)))
        assert {answer.worker for answer in answers} == {"a", "b"}
        assert {v for answer in answers for v in answer.versions} == {2}


@in_virtual_time
async def test_workers_that_ran_before_get_the_weights_of_the_hub_before_anything_else():
    there, late = steady("there"), steady("late")
    late.fail_next(1)
    async with InferenceHub([there, late], version=7, weights=weights(7)) as hub:
        assert there.loaded == [Path("/fake/7")]
        await asyncio.sleep(10)
        assert late.loaded == [Path("/fake/7")]
        answer = await hub.generate(request())
        assert set(answer.versions) == {7}
    with pytest.raises(ValueError, match="weights of version 3 with version=7"):
        InferenceHub([there], version=7, weights=weights(3))


@in_virtual_time
async def test_with_no_worker_left_every_caller_is_told_the_cause_now_and_later():
    worker = steady("only")
    async with InferenceHub([worker], max_running=1, recovery_timeout_s=10) as hub:
        calls = [asyncio.ensure_future(hub.generate(request())) for _ in range(3)]
        await asyncio.sleep(1.5)
        worker.die()
        for error in await all_ended(calls):
            assert isinstance(error, InferenceFailure)
            assert "only is dead" in str(error)
        with pytest.raises(InferenceFailure):
            await hub.generate(request())
        with pytest.raises(InferenceFailure):
            await hub.publish(weights(1))


@in_virtual_time
async def test_a_worker_that_dies_is_told_of_once_and_not_for_each_of_its_requests(caplog):
    class Deaf(FakeWorker):
        async def abort(self, request_id):
            raise WorkerFailure("nobody listens")

    worker = Deaf("dead", token_s=(1, 1), tokens=(100, 100))
    async with InferenceHub([worker, steady("well")]) as hub:
        calls = [asyncio.ensure_future(hub.generate(request())) for _ in range(20)]
        await asyncio.sleep(1)
        hub.give_up("dead", "it hangs")
        await all_ended(calls)
        await asyncio.sleep(1)
    assert sum("worker excluded" in message for message in caplog.messages) == 1
    assert not [message for message in caplog.messages if "could not abort" in message]


@in_virtual_time
async def test_a_worker_that_stays_unwell_is_told_of_once_for_each_reason(caplog):
    worker = steady("only")
    async with InferenceHub([worker], recovery_timeout_s=1000) as hub:
        worker.fail_next(20)
        await hub.generate(request())
    told = [message for message in caplog.messages if "is not healthy yet" in message]
    assert len(told) == 1


@in_virtual_time
async def test_a_pool_without_a_healthy_worker_fails_after_recovery_timeout_even_if_health_hangs():
    class Mute(FakeWorker):
        async def check_health(self):
            await asyncio.Event().wait()

    worker = Mute("mute", token_s=(1, 1), tokens=(100, 100))
    async with InferenceHub([worker], recovery_timeout_s=10, control_timeout_s=1000) as hub:
        worker.fail_next(1)
        with pytest.raises(InferenceFailure, match="mute was told to fail") as caught:
            await hub.generate(request())
        assert now() == 10
        assert isinstance(caught.value.__cause__, WorkerFailure)


@in_virtual_time
async def test_a_pool_that_recovers_in_time_answers_those_that_waited():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers, recovery_timeout_s=10) as hub:
        for worker in workers:
            worker.fail_next(3)
        assert len((await hub.generate(request())).token_ids) == 10
        await asyncio.sleep(100)
        assert len((await hub.generate(request())).token_ids) == 10
        assert all(worker.healthy for worker in hub.stats().workers)


@in_virtual_time
async def test_the_first_cause_of_the_end_is_the_one_that_is_told():
    worker = steady("w")
    async with InferenceHub([worker]) as hub:
        calls = [asyncio.ensure_future(hub.generate(request())) for _ in range(3)]
        await asyncio.sleep(0.5)
        hub._supervisor.on_exit(worker, "worker 0 (pid 7) ended with exit code -9", True)
        for error in await all_ended(calls):
            assert "worker 0 (pid 7) ended with exit code -9" in str(error)
    with pytest.raises(InferenceFailure, match="exit code -9"):
        await hub.generate(request())


@in_virtual_time
async def test_each_time_without_a_worker_has_its_own_recovery_timeout():
    worker = steady("w")
    async with InferenceHub([worker], recovery_timeout_s=10) as hub:
        worker.fail_next(1)
        await hub.generate(request())
        await asyncio.sleep(100)
        worker.die()
        died = now()
        with pytest.raises(InferenceFailure, match="w is dead"):
            await hub.generate(request())
        assert now() == died + 10


def test_a_publish_in_which_the_last_worker_dies_is_told():
    class Dying(FakeWorker):
        async def load_weights(self, weights):
            hub._supervisor.on_exit(self, "worker 0 ended with exit code -9", True)
            raise WorkerFailure("disconnected")

    async def main():
        nonlocal hub
        async with InferenceHub([Dying("w")]) as hub:
            with pytest.raises(InferenceFailure, match="exit code -9"):
                await hub.publish(weights(1))

    hub = None
    virtual_time.run(main())


@in_virtual_time
async def test_a_worker_that_the_pool_lost_is_not_looked_after():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers) as hub:
        hub._supervisor.on_exit(workers[0], "killed", True)
        await asyncio.sleep(100)
        assert not hub.stats().workers[0].healthy
        assert (await hub.generate(request())).worker == "b"
        assert not hub._supervisor._recoveries


@in_virtual_time
async def test_callers_of_a_hub_that_closes_are_told():
    hub = InferenceHub([steady()], max_running=1)
    async with hub:
        calls = [asyncio.ensure_future(hub.generate(request(max_tokens=500))) for _ in range(2)]
        await asyncio.sleep(1)
    for error in await all_ended(calls):
        assert isinstance(error, InferenceFailure)
        assert "closed" in str(error)
    with pytest.raises(InferenceFailure, match="closed"):
        await hub.generate(request())
    assert now() == 1


class Answering(FakeWorker):
    """Answers what it is told to."""

    def __init__(self, answer) -> None:
        super().__init__("odd")
        self.answer = answer

    async def generate(self, request_id, token_ids, sampling, on_tokens=None):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def answer(**changes) -> Completion:
    fields = {
        "token_ids": [1, 2], "logprobs": [-1.0, -2.0], "versions": [0, 0],
        "temperature": 1.0, "finish_reason": "stop", "worker": "odd",
    }  # fmt: skip
    return Completion(**(fields | changes))


@in_virtual_time
async def test_a_request_that_is_refused_is_its_callers_mistake_alone():
    worker = Answering(BadRequest("max_tokens must be at least 1"))
    async with InferenceHub([worker]) as hub:
        with pytest.raises(ValueError, match="max_tokens must be at least 1"):
            await hub.generate(request())
        worker.answer = answer()
        assert (await hub.generate(request())).token_ids == [1, 2]
        assert hub.stats().retries == 0


@in_virtual_time
async def test_a_constraint_is_refused_unless_every_worker_keeps_to_it():
    bound = replace(request(), sampling=SamplingParams(max_tokens=1, constraint="{}"))
    free, able = steady("free"), steady("able", constrains=True)
    async with InferenceHub([free, able]) as hub:
        with pytest.raises(ValueError, match="not all workers here.*vLLM's can"):
            await hub.generate(bound)
    async with InferenceHub([able, FixedWorker(steady("a", constrains=True))]) as hub:
        assert (await hub.generate(bound)).token_ids
        async with hub.lend(1) as lent:
            assert (await lent.generate(bound)).token_ids
    assert not free.started


@pytest.mark.parametrize(
    "lie",
    [
        answer(logprobs=[-1.0]),
        answer(versions=[0, 0, 0]),
        answer(logprobs=[-1.0, math.nan]),
        answer(logprobs=[math.inf, -math.inf]),
        answer(versions=[0, 7]),
        answer(versions=[0, -1]),
        answer(token_ids=[], logprobs=[], versions=[]),
        answer(token_ids=[1] * 11, logprobs=[-1.0] * 11, versions=[0] * 11),
    ],
)
@in_virtual_time
async def test_an_answer_that_cannot_be_true_is_never_passed_on(lie):
    async with InferenceHub([Answering(lie), steady("honest")]) as hub:
        assert (await hub.generate(request())).worker == "honest"


@in_virtual_time
async def test_a_completion_has_the_temperature_of_its_request_however_many_parts_it_came_in():
    sampling = SamplingParams(max_tokens=10, temperature=0.5)
    async with InferenceHub([steady()], update_mode="abort") as hub:
        wanted = GenerateRequest(token_ids=[1, 2], sampling=sampling)
        calls = [asyncio.ensure_future(hub.generate(wanted)) for _ in range(2)]
        await asyncio.sleep(3.5)
        await hub.publish(weights(1))
        assert [completion.temperature for completion in await asyncio.gather(*calls)] == [0.5, 0.5]


# ── everything at once ───────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_the_totals_add_up():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers) as hub:
        calls = [hub.generate(request(max_tokens=n, prompt=3)) for n in (1, 2, 3, 4)]
        running = [asyncio.ensure_future(call) for call in calls]
        await asyncio.sleep(0.5)
        stats = hub.stats()
        assert stats.running == sum(worker.running for worker in stats.workers) == 4
        assert sum(w.outstanding_tokens for w in stats.workers) == 4 * 3 + 10
        await asyncio.gather(*running)
        await asyncio.sleep(100)
        await hub.publish(weights(1))
        stats = hub.stats()
        assert (stats.requests, stats.prompt_tokens, stats.generated_tokens) == (4, 12, 10)
        assert (stats.retries, stats.publishes, stats.paused_s) == (0, 1, 2)
        # a got 1 and 4 tokens' requests or 3's: each is busy as long as its longest one.
        assert sorted(worker.busy_s for worker in stats.workers) == [3, 4]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), mode=st.sampled_from(["keep", "abort", "wait"]))
@in_virtual_time
async def test_every_request_ends_exactly_once_whatever_happens(seed, mode):
    rng = random.Random(seed)

    workers = [
        FakeWorker(f"w{n}", seed=rng.randrange(10**6), token_s=(0.01, 1.0)) for n in range(3)
    ]
    ends = {"answered": 0, "cancelled": 0}
    async with InferenceHub(workers, max_running=4, request_timeout_s=40, update_mode=mode) as hub:

        async def one(number):
            await asyncio.sleep(rng.uniform(0, 30))
            try:
                async with asyncio.timeout(rng.choice([5.0, 10_000.0])):
                    got = await hub.generate(request(rng.randint(1, 20), session=str(number)))
                assert 1 <= len(got.token_ids) == len(got.logprobs) == len(got.versions) <= 20
                assert sorted(got.versions) == got.versions, "versions only grow"
                ends["answered"] += 1
            except TimeoutError:
                ends["cancelled"] += 1
            finally:
                hub.forget(str(number))

        async def trouble():
            for _ in range(5):
                await asyncio.sleep(rng.uniform(0, 8))
                victim = rng.choice(workers)
                luck = rng.random()
                if luck < 0.4:
                    victim.fail_next(rng.randint(1, 3))
                elif luck < 0.6 and victim is not workers[0]:  # one stays, to answer them all
                    victim.die()
                else:
                    victim.hang()
                    await asyncio.sleep(rng.uniform(0, 60))
                    victim.wake()

        async def publishing():
            for version in range(1, 6):
                await asyncio.sleep(rng.uniform(0, 8))
                await hub.publish(weights(version))

        async with asyncio.TaskGroup() as tasks:
            for number in range(60):
                tasks.create_task(one(number))
            tasks.create_task(trouble())
            tasks.create_task(publishing())
        stats = hub.stats()
        assert stats.queued == stats.running == 0
        assert all(w.outstanding_tokens == 0 for w in stats.workers)
        assert not any(hub.whereabouts(str(number)) for number in range(60))
    assert sum(ends.values()) == 60
    assert max(worker.max_running_seen for worker in workers) <= 4
    assert asyncio.all_tasks() == {asyncio.current_task()}
