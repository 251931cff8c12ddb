"""Planted stalls, each named rightly, and what is done about them; under virtual time."""

import asyncio
import contextlib
import threading

import pytest

from flash import virtual_time
from flash.agents.environment_agent import EnvironmentAgent
from flash.errors import RolloutStall
from flash.evaluation.config import EvalConfig
from flash.evaluation.evaluations import Evaluations
from flash.fakes import FakeEnvs, FakePool, FakeStyle, FakeWorker, KeepingObserver
from flash.hub.hub import InferenceHub
from flash.hub.queue import RequestQueue
from flash.rollout.loop import RolloutLoop
from flash.rollout.stall.blocked import watched_event_loop
from flash.seeds import HELDOUT_SEEDS
from flash.types import Task, TrainerState
from tests.loops import loop_options
from tests.steady import weights

STALL_S = 50.0


@contextlib.asynccontextmanager
async def rollouts(
    *, workers=None, envs=None, agent=EnvironmentAgent, agent_options=None, **options
):
    """A synchronous loop, so that all four episodes are needed; other deadlines are far."""
    envs = envs or FakeEnvs(turns=(2, 2), step_s=(1, 1))
    settings = {"max_tokens": 4, "step_timeout_s": 1e9, "episode_timeout_s": 1e9}
    settings |= agent_options or {}
    hub = InferenceHub(
        workers or [FakeWorker("w")],
        request_timeout_s=1e9, control_timeout_s=1e9, recovery_timeout_s=1e9,
    )  # fmt: skip
    options = {
        "batch_size": 4, "group_size": 2, "alpha": 0, "stall_timeout_s": STALL_S,
        "caller_timeout_s": STALL_S, "tasks": (Task(seed) for seed in range(10**6)), **options,
    }  # fmt: skip

    def make_agent():
        return agent(envs=envs, style=FakeStyle(), **settings)

    async with hub, RolloutLoop(hub, agent=make_agent, **loop_options(**options)) as loop:
        yield loop


def stalls(main) -> RolloutStall:
    """The stall that ends `main`."""
    with pytest.raises(RolloutStall) as caught:
        virtual_time.run(main())
    return caught.value


class AsleepOnce(FakeEnvs):
    """Its first call never returns."""

    async def take_time(self):
        if not hasattr(self, "slept"):
            self.slept = True
            await asyncio.Event().wait()
        await super().take_time()


def test_an_answer_that_is_lost_is_told_from_a_worker_that_hangs():
    async def lost():
        worker = FakeWorker("careless")
        worker.lose_next(1)
        async with rollouts(workers=[worker]) as loop:
            await loop.next_batch()

    stall = stalls(lost)
    assert stall.cause == "lost_answer"
    assert "an answer is lost: worker careless has had a request for" in str(stall)
    assert "1 episodes block, of 1 that run" in str(stall)
    assert "4 episodes" not in str(stall)

    async def hangs():
        worker = FakeWorker("sleepy")
        async with rollouts(workers=[worker]) as loop:
            await asyncio.sleep(0.01)
            worker.hang()
            await loop.next_batch()

    stall = stalls(hangs)
    assert stall.cause == "worker_hangs"
    assert "worker sleepy hangs" in str(stall)


def test_an_environment_that_sleeps_is_named_with_episode_seed_stage_and_stack():
    async def main():
        async with rollouts(envs=AsleepOnce(turns=(1, 1), step_s=(1, 1))) as loop:
            await loop.next_batch()

    stall = stalls(main)
    assert stall.cause == "env_asleep"
    assert "episode 0 (seed 0, group 0, attempt 1) in stage 'env'" in str(stall)
    assert "test_watchdog.py" in str(stall), "the innermost line is the sleeper's own"
    assert "await asyncio.Event().wait()" in str(stall)
    assert "3 are ready" in str(stall)


def test_a_reward_that_is_deadlocked_is_named():
    locks = [asyncio.Lock(), asyncio.Lock()]

    async def deadlocked(seen):
        locks.reverse()
        first, second = locks
        async with first:
            await asyncio.sleep(1)
            async with second:
                return 1.0

    async def main():
        options = {"reward": deadlocked, "reward_timeout_s": 1e9}
        async with rollouts(agent_options=options) as loop:
            await loop.next_batch()

    stall = stalls(main)
    assert stall.cause == "reward_hangs"
    where = str(stall).splitlines()[0]
    assert "in deadlocked: async with second: [reward_hangs]" in where, "not asyncio's own line"


def test_an_agent_that_waits_for_something_of_its_own_is_named_with_the_line():
    class Brooding(EnvironmentAgent):
        async def play(self, episode):
            await asyncio.Event().wait()  # for inspiration

    async def main():
        async with rollouts(agent=Brooding) as loop:
            await loop.next_batch()

    stall = stalls(main)
    assert stall.cause == "agent_waits"
    assert "for inspiration" in str(stall)
    assert "4 episodes block, of 4 that run" in str(stall)


def test_workers_that_are_all_out_are_named_before_the_hub_gives_them_up():
    async def main():
        workers = [FakeWorker("a"), FakeWorker("b")]
        async with rollouts(workers=workers) as loop:
            for worker in workers:
                worker.die()
            await loop.next_batch()

    stall = stalls(main)
    assert stall.cause == "workers_out"
    assert "all 2 workers are out" in str(stall)


def test_a_queue_that_gives_nobody_a_place_is_named(monkeypatch):
    """That would be a bug of ours, so it is planted by a patch."""
    monkeypatch.setattr(RequestQueue, "_least_loaded", lambda queue: None)

    async def main():
        async with rollouts() as loop:
            await loop.next_batch()

    stall = stalls(main)
    assert stall.cause == "queue_stuck"
    assert "the hub's queue is stuck: 4 requests wait beside workers with room" in str(stall)


def test_a_publish_that_is_stuck_ends_the_run_in_the_midst_of_it():
    async def main():
        stuck = FakeWorker("stuck", load_s=lambda rng: 1e9)
        async with rollouts(workers=[FakeWorker("fine"), stuck]) as loop:
            await loop.next_batch()
            await loop.publish(weights(1))

    stall = stalls(main)
    assert stall.cause == "publish_stuck"
    assert "worker stuck does not take the new weights" in str(stall)


def test_a_trainer_that_hangs_or_is_dead_is_named():
    async def main(state=None):
        trainer = None if state is None else lambda: state
        async with rollouts(trainer=trainer) as loop:
            await loop.next_batch()
            await asyncio.Event().wait()  # for the optimizer

    stall = stalls(main)
    assert stall.cause == "trainer_hangs"
    assert "whoever took the last batch" in str(stall)
    assert "for the optimizer" in str(stall), "the caller's stack"

    stall = stalls(lambda: main(TrainerState(doing="step", since=1.0)))
    assert stall.cause == "trainer_hangs"
    assert "it has been in 'step' for" in str(stall)

    stall = stalls(lambda: main(TrainerState(dead="rank 0 was killed")))
    assert stall.cause == "trainer_dead"
    assert "rank 0 was killed" in str(stall)


def test_the_caller_has_a_deadline_of_its_own_and_a_dead_trainer_not_so_much_time():
    async def main(state, rest_s):
        async with rollouts(trainer=lambda: state, caller_timeout_s=1000.0) as loop:
            await loop.next_batch()
            await asyncio.sleep(rest_s)
            return asyncio.get_running_loop().time()

    at_work = TrainerState(doing="step", since=1.0)
    assert virtual_time.run(main(at_work, 900)) > 900
    with pytest.raises(RolloutStall):
        virtual_time.run(main(at_work, 1100))
    with pytest.raises(RolloutStall):
        virtual_time.run(main(TrainerState(dead="killed"), 900))
    waits = TrainerState(doing="start", since=1.0, waits_for="a node")
    assert virtual_time.run(main(waits, 86_400)) > 86_400


def test_a_trainer_that_starts_anew_has_a_deadline_for_each_of_its_calls():
    async def main(call_s, calls):
        now = asyncio.get_running_loop().time
        state = TrainerState()
        async with rollouts(trainer=lambda: state, caller_timeout_s=1000.0) as loop:
            await loop.next_batch()
            for _ in range(calls):
                state = TrainerState(doing="restart: step", since=now())
                await asyncio.sleep(call_s)
            return now()

    assert virtual_time.run(main(900, 5)) > 4500
    with pytest.raises(RolloutStall, match="in 'restart: step'"):
        virtual_time.run(main(1100, 5))


def test_batches_that_nobody_collects_are_named():
    async def main():
        async with rollouts():
            await asyncio.sleep(1e6)

    stall = stalls(main)
    assert stall.cause == "nobody_collects"
    assert "4 episodes are ready for a batch" in str(stall)


@pytest.mark.parametrize("mode", ["pause", "beside"])
def test_an_evaluation_that_hangs_is_named_as_a_batch_is(mode, caplog):
    reports = []

    async def main():
        workers = [FakeWorker("a"), FakeWorker("b")]
        kept = KeepingObserver(reports=reports)
        async with rollouts(workers=workers, caller_timeout_s=1e9, observers=[kept]) as loop:
            asleep = FakeEnvs(hang_rate=1.0)
            agent = lambda: EnvironmentAgent(  # noqa: E731
                envs=asleep, style=FakeStyle(), max_tokens=4, step_timeout_s=1e9,
                episode_timeout_s=1e9,
            )  # fmt: skip
            evaluations = Evaluations(
                EvalConfig(tasks=1, mode=mode), loop, hub=loop.hub, agent=agent, every=1, last=9,
                observer=kept, stop=asyncio.Event(),
            )  # fmt: skip
            async with evaluations:
                await evaluations.after(1)

    if mode == "pause":
        assert stalls(main).cause == "env_asleep"
    else:  # the run goes on without it
        virtual_time.run(main())
        assert "the evaluation of version 1 is lost" in caplog.text
    (report,) = reports
    assert report.startswith("evaluation: no progress for 50.0 s: the environment is asleep in")
    assert (
        f"episode -1 (seed {HELDOUT_SEEDS[0]}, group -1, attempt 1) in stage 'env' for 50.0 s"
        in report
    )
    assert "await asyncio.Event().wait()" in report
    assert "worker b: healthy" in report or "worker a: healthy" in report


def test_a_second_batch_without_a_publish_is_named():
    async def main():
        async with rollouts() as loop:
            await loop.next_batch()
            await loop.next_batch()

    stall = stalls(main)
    assert stall.cause == "publish_missing"
    assert "alpha=0 nothing more is started until version 1 is published" in str(stall)


def test_the_eviction_of_everything_is_a_stall_though_episodes_end_all_the_time():
    async def publish_often(loop):
        for version in range(1, 10**6):
            await asyncio.sleep(2)  # and an episode takes three
            await loop.publish(weights(version))

    async def main():
        envs = FakeEnvs(turns=(2, 2), step_s=(1, 1))
        worker = FakeWorker("w", load_s=(0, 0))
        async with rollouts(envs=envs, workers=[worker]) as loop, asyncio.TaskGroup() as tasks:
            publisher = tasks.create_task(publish_often(loop))
            try:
                await loop.next_batch()
            finally:
                publisher.cancel()

    with pytest.raises(BaseExceptionGroup) as caught:
        virtual_time.run(main())
    stall = caught.value.exceptions[0]
    assert stall.cause == "all_stale"
    assert "everything grows stale" in str(stall)
    assert "cancelled(stale)" in str(stall)


def test_a_task_source_that_hangs_is_named_from_outside_of_the_event_loop_that_it_blocks():
    found, reports = threading.Event(), []

    def tasks():
        yield from (Task(seed) for seed in range(3))
        assert found.wait(60), "nobody noticed"
        yield from (Task(seed) for seed in range(3, 10**6))

    def on_blocked(report):
        reports.append(report)
        found.set()

    async def main():
        async with rollouts(tasks=tasks(), envs=FakeEnvs(step_s=(0, 0))) as loop:
            with watched_event_loop(0.2, on_blocked):
                await loop.next_batch()
                await loop.publish(weights(1))

    asyncio.run(main())
    assert "the task source hangs, and blocks the event loop, at " in reports[0]
    assert "in tasks: assert found.wait(60)" in reports[0]
    assert "[task_source_hangs]" in reports[0]


def test_whatever_blocks_the_event_loop_is_named_with_its_line_and_stack():
    found, reports = threading.Event(), []

    def on_blocked(report):
        reports.append(report)
        found.set()

    async def main():
        with watched_event_loop(0.2, on_blocked):
            assert found.wait(60), "nobody noticed"

    asyncio.run(main())
    assert "the event loop is blocked, at " in reports[0].splitlines()[0]
    assert "in main: assert found.wait(60)" in reports[0].splitlines()[0]


def test_an_agent_that_ignores_its_cancellation_is_named():
    class Stubborn(EnvironmentAgent):
        async def play(self, episode):
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
                    break
                if self.closing.is_set():
                    raise asyncio.CancelledError

    async def main():
        Stubborn.closing = asyncio.Event()
        async with rollouts(agent=Stubborn, on_stall="replace") as loop:
            try:
                await loop.next_batch()
            finally:
                Stubborn.closing.set()

    stall = stalls(main)
    assert stall.cause == "cancellation_ignored"
    assert "ignored the cancellation, for 'stall'" in str(stall)


def test_replace_cancels_what_blocks_and_starts_its_tasks_again():
    async def main():
        records, reports = [], []
        async with rollouts(
            envs=AsleepOnce(step_s=(1, 1)), on_stall="replace",
            observers=[KeepingObserver(records, reports)],
        ) as loop:  # fmt: skip
            batch = await loop.next_batch()
        return batch, records, reports

    batch, records, (report,) = virtual_time.run(main())
    cancelled = [r for r in records if r.outcome == "cancelled"]
    assert [(r.reason, r.seed) for r in cancelled] == [("stall", 0)]
    assert len(batch.samples) == 4
    assert report.endswith("on_stall=replace: replace")
    assert "[env_asleep]" in report


def test_restart_starts_the_worker_at_fault_anew_and_no_episode_is_lost():
    async def main():
        worker = FakeWorker("sleepy")
        pool = FakePool([worker], start_s=5.0)
        reports, records = [], []
        async with rollouts(
            workers=pool, on_stall="restart", observers=[KeepingObserver(records, reports)]
        ) as loop:
            await asyncio.sleep(0.01)
            worker.hang()
            await loop.next_batch()
            return pool.deaths, reports, {r.outcome for r in records}

    deaths, reports, outcomes = virtual_time.run(main())
    assert deaths == 1
    assert outcomes == {"trained"}
    assert reports[0].endswith("on_stall=restart: restart")


def test_remedies_that_bring_nothing_are_not_tried_for_ever():
    async def main():
        reports = []
        with pytest.raises(RolloutStall):
            async with rollouts(
                envs=FakeEnvs(hang_rate=1.0),
                on_stall="replace",
                observers=[KeepingObserver(reports=reports)],
            ) as loop:
                await loop.next_batch()
        return reports

    reports = virtual_time.run(main())
    assert [report.rpartition(" ")[2] for report in reports] == ["replace"] * 3 + ["stop"]


def test_a_run_that_gets_on_is_left_alone():
    async def main():
        reports = []
        envs = FakeEnvs(turns=(30, 30), step_s=(40, 45))  # an episode takes 1200 s
        async with rollouts(envs=envs, observers=[KeepingObserver(reports=reports)]) as loop:
            for version in range(1, 4):
                await loop.next_batch()
                await asyncio.sleep(STALL_S - 1)
                await loop.publish(weights(version))
        return reports

    assert virtual_time.run(main()) == []
