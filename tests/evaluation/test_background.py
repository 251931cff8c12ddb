"""Evaluation on a share of the workers: rollout goes on, and the share's weights stay."""

import asyncio
import contextlib

import pytest

from flash import virtual_time
from flash.agents.environment_agent import EnvironmentAgent
from flash.errors import InferenceFailure, RolloutFailure
from flash.evaluation.background import BackgroundEvaluation
from flash.evaluation.play import play
from flash.fakes import FakeEnvs, FakePool, FakeStyle, FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.loop import RolloutLoop
from flash.types import Task
from flash.virtual_time import in_virtual_time
from tests.loops import evaluate, evaluate_beside
from tests.steady import weights

EXAM = [Task(seed) for seed in range(40)]


def make_agent():
    return EnvironmentAgent(envs=FakeEnvs(turns=(3, 3)), style=FakeStyle(), max_tokens=8)


@contextlib.asynccontextmanager
async def rollouts(workers, **options):
    tasks = (Task(seed) for seed in range(10**6))
    sizes = {"batch_size": 8, "group_size": 2, "alpha": 1, **options}
    async with (
        InferenceHub(workers, max_running=4, recovery_timeout_s=20.0) as hub,
        RolloutLoop(hub, agent=make_agent, tasks=tasks, **sizes) as loop,
    ):
        yield loop


def fakes(count=2, **options):
    return [FakeWorker(name, seed=n, **options) for n, name in enumerate("abcdef"[:count])]


@in_virtual_time
async def test_an_evaluation_beside_belongs_to_one_version_while_others_are_published():
    workers = fakes()
    async with rollouts(workers) as loop, asyncio.TaskGroup() as tasks:
        batch = await loop.next_batch()
        await loop.publish(weights(1))
        exam = tasks.create_task(evaluate_beside(loop, make_agent, EXAM))
        await asyncio.sleep(0.01)  # it begins
        published = []
        while not exam.done():
            batch = await loop.next_batch()
            published.append(await loop.publish(weights(batch.version + 1)))
        assert exam.result().versions == (1,)
        assert exam.result().episodes == len(EXAM)
        assert exam.result().metrics()["eval/version"] == 1
        assert len(published) >= 3, "rollout went on"
        assert {report.workers for report in published[:-1]} == {1}
        version = published[-1].version
        await asyncio.sleep(5)
        assert [w.version for w in workers] == [version] * 2, "the share caught up"
        stats = loop.hub.stats()
        assert all(worker.healthy for worker in stats.workers)
        batch = await loop.next_batch()
        report = await loop.publish(weights(batch.version + 1))
        assert report.workers == 2


@in_virtual_time
async def test_the_share_takes_no_request_of_the_rollout_and_gives_none_of_its_own_away():
    workers = fakes(3, token_s=(1, 1), tokens=(4, 8))
    async with rollouts(workers) as loop:
        async with loop.hub.lend(1) as share:
            assert len(share.stats().workers) == 1
            (lent,) = (w for w in workers if w.name == share.stats().workers[0].name)
            await asyncio.sleep(30)  # what it was at is done
            before = len(lent.started)
            for version in range(1, 4):
                batch = await loop.next_batch()
                await loop.publish(weights(batch.version + 1))
                assert lent.version == 0, version
            assert len(lent.started) == before
            idle_s = loop.hub.stats().workers[workers.index(lent)].busy_s
            exam = play(share, make_agent, EXAM, concurrency=8)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(exam)
                await asyncio.sleep(2)
                busy_s = loop.hub.stats().workers[workers.index(lent)].busy_s - idle_s
            assert 0 < busy_s <= 2, "told while it is busy, not all at once at the end"
        await asyncio.sleep(5)
        with pytest.raises(InferenceFailure, match="3 of 3 healthy workers can't be lent"):
            async with loop.hub.lend(3):
                pass


@in_virtual_time
async def test_a_share_that_dies_costs_the_evaluation_and_not_the_run():
    workers = fakes()
    pool = FakePool(workers, start_s=5.0)
    told = []
    async with rollouts(pool) as loop, BackgroundEvaluation(told.append) as beside:
        beside.begin(0, lambda: evaluate_beside(loop, make_agent, EXAM))
        await asyncio.sleep(1)
        (lent,) = (w for w, s in zip(workers, loop.hub.stats().workers, strict=True) if s.lent)
        pool.kill(lent)
        await beside.finish()
        assert told == []
        for _ in range(4):
            batch = await loop.next_batch()
            await loop.publish(weights(batch.version + 1))
            await asyncio.sleep(5)
        assert lent.version == 4, "it is back, with the present weights"
        beside.begin(4, lambda: evaluate_beside(loop, make_agent, EXAM))
        await beside.finish()
        assert [evaluation.versions for evaluation in told] == [(4,)]


def test_one_evaluation_runs_beside_at_a_time_and_the_next_is_left_out_with_a_word(caplog):
    async def main():
        told = []
        async with rollouts(fakes()) as loop:
            async with BackgroundEvaluation(told.append) as beside:
                beside.begin(0, lambda: evaluate_beside(loop, make_agent, EXAM))
                beside.begin(1, lambda: evaluate_beside(loop, make_agent, EXAM))
            assert len(told) == 1, "leaving waits for it"
            with contextlib.suppress(KeyError):
                async with BackgroundEvaluation(told.append) as beside:
                    beside.begin(2, lambda: evaluate_beside(loop, make_agent, EXAM))
                    raise KeyError
            assert len(told) == 1, "an error does not"

    virtual_time.run(main())
    assert "evaluation of version 1 is left out: that of version 0 still runs" in caplog.text


def test_an_evaluation_that_fails_is_told_and_the_run_goes_on(caplog):
    async def main():
        async def failing():
            raise RolloutFailure("all 40 tasks failed")

        async with BackgroundEvaluation(lambda _: None) as beside:
            beside.begin(7, failing)

    virtual_time.run(main())
    assert "evaluation of version 7 is lost: all 40 tasks failed" in caplog.text


@in_virtual_time
async def test_a_mistake_of_the_users_that_an_evaluation_finds_ends_the_run_as_it_is():
    async def mistaken():
        raise ValueError("env.eval_options: no such split")

    with pytest.raises(ValueError, match="no such split"):
        async with BackgroundEvaluation(lambda _: None) as beside:
            beside.begin(7, mistaken)
            await asyncio.Event().wait()  # for the next batch, say


def test_a_pausing_evaluation_tells_its_version_too():
    async def main():
        async with rollouts(fakes()) as loop:
            await loop.next_batch()
            await loop.publish(weights(1))
            return await evaluate(loop, make_agent, EXAM)

    assert virtual_time.run(main()).versions == (1,)
