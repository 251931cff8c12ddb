"""The rollout loop's behaviour, one promise at a time, under virtual time."""

import asyncio
import contextlib
from collections import Counter

import numpy as np
import pytest

from flash import virtual_time
from flash.agents.environment_agent import EnvironmentAgent
from flash.errors import EnvFailure, InferenceFailure, RolloutFailure
from flash.fakes import FakeEnvs, FakeStyle, FakeWorker, KeepingObserver
from flash.hub.hub import InferenceHub
from flash.rollout.episode import Abort, Cancelled, Episode, Start, Stop
from flash.rollout.loop import RolloutLoop
from flash.rollout.observer import Observer
from flash.trainer.advantage_settings import Reinforce
from flash.trainer.advantages import make_advantages
from flash.types import Task
from flash.virtual_time import in_virtual_time
from tests.loops import evaluate, loop_options
from tests.steady import weights


def tasks(count: int = 10**6):
    return (Task(seed) for seed in range(count))


@contextlib.asynccontextmanager
async def rollouts(*, envs=None, worker=None, agent=None, agent_options=None, hub=None, **options):
    """A loop of small batches over one fake worker, with what the test changes."""
    envs = envs or FakeEnvs()
    settings = {"max_tokens": 4, "step_timeout_s": 10.0, "episode_timeout_s": 100.0}
    settings |= agent_options or {}

    def make_agent():
        return (agent or EnvironmentAgent)(envs=envs, style=FakeStyle(), **settings)

    options = {"batch_size": 4, "group_size": 2, "alpha": 1, "tasks": tasks(), **options}
    async with (
        InferenceHub([worker or FakeWorker("w")], **(hub or {})) as inference,
        RolloutLoop(inference, agent=make_agent, **loop_options(**options)) as loop,
    ):
        loop.make_agent = make_agent
        yield loop


@in_virtual_time
async def test_admission_fills_the_capacity_and_publish_frees_it():
    async with rollouts(alpha=1.5) as loop:
        assert loop.capacity == 10
        assert loop.ledger.running == 10
        await loop.next_batch()
        await asyncio.sleep(1000)
        assert loop.ledger.running + loop.ledger.ready == 6, "slots stay held until publish"
        await loop.publish(weights(1))
        assert loop.ledger.running + loop.ledger.ready == 10


@in_virtual_time
async def test_alpha_zero_admits_nothing_between_batch_and_publish():
    async with rollouts(alpha=0) as loop:
        await loop.next_batch()
        await asyncio.sleep(1000)
        assert (loop.ledger.running, loop.ledger.ready) == (0, 0)
        await loop.publish(weights(1))
        assert loop.ledger.running == 4


@in_virtual_time
async def test_groups_are_handed_over_oldest_first_and_whole():
    async with rollouts(alpha=3) as loop:
        await asyncio.sleep(1000)  # all of them are ready
        batch = await loop.next_batch()
        assert Counter(sample.group for sample in batch.samples) == {0: 2, 1: 2}


@in_virtual_time
async def test_a_straggler_holds_up_nobody():
    class OneHangs(FakeEnvs):
        async def take_time(self):
            if not hasattr(self, "hung"):
                self.hung = True
                await asyncio.sleep(50)
            await super().take_time()

    options = {"step_timeout_s": 1e6, "episode_timeout_s": 1e6}
    async with rollouts(envs=OneHangs(step_s=(1, 1)), agent_options=options) as loop:
        batch = await loop.next_batch()
        assert 0 not in {sample.group for sample in batch.samples}
        assert asyncio.get_running_loop().time() < 50


@in_virtual_time
async def test_an_episode_that_begins_to_sample_too_late_is_in_no_batch():
    begin = asyncio.Event()

    class TheFifthWaits(FakeEnvs):
        async def open(self):
            env = await super().open()

            async def reset(task):
                if task.seed == 4:
                    await begin.wait()
                return await type(env).reset(env, task)

            env.reset = reset
            return env

    records = []
    async with rollouts(
        envs=TheFifthWaits(), batch_size=2, group_size=1, alpha=1.5,
        observers=[KeepingObserver(records)],
        advantages=make_advantages(Reinforce(baseline="none")),
        agent_options={"step_timeout_s": 1e6, "episode_timeout_s": 1e6},
    ) as loop:  # fmt: skip
        await loop.next_batch()
        await loop.next_batch()
        begin.set()  # it samples from version 0 for a batch at version 2
        part = asyncio.create_task(loop.next_part())
        await asyncio.sleep(100)
        assert not part.done()
        assert [(r.outcome, r.reason) for r in records if r.group == 4] == [("dropped", "stale")]
        await loop.publish(weights(2))
        assert (await part).metrics["staleness/max"] <= 1


def test_stale_episodes_are_started_again_dropped_or_waited_for():
    class FirstGroupIsSlow(FakeEnvs):
        """Its episodes sample a turn at once, and then take their time."""

        async def open(self):
            env = await super().open()
            step = env.step

            async def slow_step(action):
                await asyncio.sleep(100 if env.seed == 0 else 0)
                return await step(action)

            async def reset(task):
                env.seed = task.seed
                return await type(env).reset(env, task)

            env.step, env.reset = slow_step, reset
            return env

    async def main(on_stale):
        records = []
        options = {"step_timeout_s": 1e6, "episode_timeout_s": 1e6}
        async with rollouts(
            envs=FirstGroupIsSlow(turns=(2, 2), step_s=(1, 1)), agent_options=options,
            on_stale=on_stale, observers=[KeepingObserver(records)],
        ) as loop:  # fmt: skip
            for version in range(1, 4):
                batch = await loop.next_batch()
                await asyncio.sleep(1)
                await loop.publish(weights(version))
                if 0 in {sample.group for sample in batch.samples}:
                    break
            now = asyncio.get_running_loop().time()
        outcomes = Counter((r.outcome, r.reason) for r in records if r.group == 0)
        return outcomes, now

    outcomes, now = virtual_time.run(main("regenerate"))
    assert outcomes[("cancelled", "stale")] >= 2
    assert now < 100
    outcomes, now = virtual_time.run(main("drop"))
    assert outcomes == {("cancelled", "stale"): 2}
    assert now < 100
    outcomes, now = virtual_time.run(main("wait"))
    assert outcomes == {("trained", ""): 2}
    assert now > 200, "the batch was held until the slow group ended"


def test_an_episode_past_its_deadlines_fails_and_is_started_again():
    async def main(agent_options, hang_rate):
        records = []
        async with rollouts(
            envs=FakeEnvs(hang_rate=hang_rate, step_s=(1, 1)), agent_options=agent_options,
            observers=[KeepingObserver(records)], max_attempts=100, alpha=0,
        ) as loop:  # fmt: skip
            await loop.next_batch()
        return Counter((r.outcome, r.reason) for r in records)

    outcomes = virtual_time.run(main({}, 0.3))
    assert outcomes[("failed", "env")] > 0
    outcomes = virtual_time.run(main({"step_timeout_s": 1e6, "episode_timeout_s": 7.0}, 0.3))
    assert outcomes[("failed", "deadline")] > 0
    assert outcomes[("trained", "")] == 4


@in_virtual_time
async def test_a_group_that_keeps_failing_is_given_up_and_replaced():
    class FirstTaskFails(FakeEnvs):
        async def open(self):
            env = await super().open()
            reset = env.reset

            async def failing(task):
                if task.seed == 0:
                    raise EnvFailure("always")
                return await reset(task)

            env.reset = failing
            return env

    records = []
    async with rollouts(envs=FirstTaskFails(), observers=[KeepingObserver(records)]) as loop:
        batch = await loop.next_batch()
        assert 0 not in {sample.group for sample in batch.samples}
    failed = [r for r in records if r.outcome == "failed"]
    assert {r.group for r in failed} == {0}
    assert max(r.attempt for r in failed) == 3


@in_virtual_time
async def test_a_run_in_which_everything_fails_ends_with_the_cause():
    async with rollouts(envs=FakeEnvs(fail_rate=1.0)) as loop:
        with pytest.raises(RolloutFailure, match="none came to its end between.*planned"):
            await loop.next_batch()


@in_virtual_time
async def test_an_agent_that_crashes_is_replaced_and_its_task_started_again():
    crashes = iter([True, True, False])

    class Crashing(EnvironmentAgent):
        async def play(self, episode):
            if next(crashes, False):
                raise KeyError("a bug")
            return await super().play(episode)

    records = []
    async with rollouts(agent=Crashing, observers=[KeepingObserver(records)]) as loop:
        await loop.next_batch()
        assert loop.crashes == 2
    assert Counter(r.reason for r in records if r.outcome == "failed") == {"agent": 2}


def test_a_stall_is_named_with_episode_stage_and_time():
    async def main():
        options = {"step_timeout_s": 1e9, "episode_timeout_s": 1e9}
        async with rollouts(
            envs=FakeEnvs(hang_rate=1.0), agent_options=options, stall_timeout_s=50
        ) as loop:
            with pytest.raises(RolloutFailure) as caught:
                await loop.next_batch()
        return str(caught.value)

    message = virtual_time.run(main())
    assert "no progress for 50.0 s: the environment is asleep" in message
    assert "episode 0 (seed 0, group 0, attempt 1) in stage 'env' for 50.0 s" in message


@in_virtual_time
async def test_a_pool_with_no_worker_left_ends_the_run_with_the_cause():
    worker = FakeWorker("only")
    async with rollouts(worker=worker, hub={"recovery_timeout_s": 5.0}) as loop:
        worker.die()
        with pytest.raises(InferenceFailure, match="no inference worker is left.*only is dead"):
            await loop.next_batch()


@in_virtual_time
async def test_tasks_that_end_are_an_error_that_says_so_not_a_hang():
    async with rollouts(tasks=tasks(3), alpha=0) as loop:
        await loop.next_batch()
        await loop.publish(weights(1))
        with pytest.raises(RolloutFailure, match="the tasks have ended"):
            await loop.next_batch()


@in_virtual_time
async def test_a_batch_that_is_awaited_as_the_tasks_end_in_a_publish_is_told_at_once():
    async with rollouts(tasks=tasks(2), alpha=0) as loop:
        await loop.next_batch()
        awaited = asyncio.create_task(loop.next_batch())
        await asyncio.sleep(1)
        await loop.publish(weights(1))
        with pytest.raises(RolloutFailure, match="the tasks have ended"):
            await asyncio.wait_for(awaited, 1)


def tasks_that_break(after: int):
    yield from tasks(after)
    raise OSError("the file of tasks is gone")


@pytest.mark.parametrize("given", [0, 6], ids=["at once", "later"])
def test_what_the_task_source_raises_ends_the_run(given):
    async def main():
        async with rollouts(tasks=tasks_that_break(given), alpha=0) as loop:
            with pytest.raises(OSError, match="the file of tasks is gone"):
                for version in range(1, 9):
                    await loop.next_batch()
                    await loop.publish(weights(version))
            loop.ledger.check()
            return loop.ledger.count("trained")

    assert virtual_time.run(main()) == 2 * given


def test_what_the_making_of_an_agent_raises_ends_the_run_and_an_evaluation():
    left = 3

    class Scarce(EnvironmentAgent):
        def __init__(self, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise MemoryError("no room for another agent")
            super().__init__(**options)

        async def play(self, episode):
            raise KeyError("it takes a new agent for each episode")

    async def main(use):
        nonlocal left
        left = 3
        async with rollouts(agent=Scarce, max_attempts=1000) as loop:
            with pytest.raises(MemoryError, match="no room for another agent"):
                await use(loop)

    virtual_time.run(main(lambda loop: loop.next_batch()))
    virtual_time.run(
        main(lambda loop: evaluate(loop, loop.make_agent, [Task(seed) for seed in range(9)]))
    )


@in_virtual_time
async def test_what_is_told_of_an_episode_and_raises_ends_the_run_and_leaves_the_counts_right():
    class Full(Observer):
        def ended(self, episode, record):
            raise OSError("no space left on device")

    envs = FakeEnvs(fail_rate=0.5)
    async with rollouts(envs=envs, observers=[Full()]) as loop:
        with pytest.raises(OSError, match="no space left"):
            for version in range(1, 9):
                await loop.next_batch()
                await loop.publish(weights(version))
        assert loop.crashes == 0, "no agent is to blame"
    assert (loop.ledger.running, loop.ledger.ready, envs.open_now) == (0, 0, 0)


@in_virtual_time
async def test_evaluation_pauses_admission_and_stays_out_of_the_ledger():
    async with rollouts(alpha=1) as loop:
        batch = await loop.next_batch()
        held = loop.ledger.begun
        evaluation = await evaluate(loop, loop.make_agent, [Task(seed) for seed in range(20)])
        assert evaluation.episodes == 20
        assert 0 <= evaluation.success_rate <= 1
        assert loop.ledger.begun == held
        await loop.publish(weights(batch.version + 1))
        assert loop.ledger.begun > held


@in_virtual_time
async def test_an_evaluation_that_is_cancelled_as_the_loop_closes_admits_nothing():
    async with rollouts(alpha=1) as loop:
        await loop.next_batch()
        evaluation = asyncio.ensure_future(
            evaluate(loop, loop.make_agent, [Task(seed) for seed in range(20)])
        )
        await asyncio.sleep(0)  # it begins
        admitted = loop.ledger.begun
        evaluation.cancel()
    assert evaluation.cancelled()
    assert loop.ledger.begun == admitted
    assert loop.ledger.running == 0


def test_an_evaluation_task_that_fails_is_tried_again_and_counted_if_it_keeps_failing():
    async def main():
        async with rollouts(envs=FakeEnvs(fail_rate=0.4), max_attempts=2) as loop:
            return await evaluate(loop, loop.make_agent, [Task(seed) for seed in range(40)])

    evaluation = virtual_time.run(main())
    assert evaluation.failed > 0
    assert evaluation.episodes + evaluation.failed == 40


def test_advantages_are_relative_to_the_group():
    async def main():
        async with rollouts(batch_size=16, group_size=4) as loop:
            return await loop.next_batch()

    batch = virtual_time.run(main())
    for group in {sample.group for sample in batch.samples}:
        members = [sample for sample in batch.samples if sample.group == group]
        rewards = np.array([sample.reward for sample in members])
        expected = (rewards - rewards.mean()) / rewards.std() if rewards.std() else 0 * rewards
        assert np.allclose([sample.advantage for sample in members], expected)


def test_advantages_of_turns_reach_their_tokens():
    def by_turn(groups):
        return [[np.arange(1.0, 1 + len(t.turn_rewards)) for t in group] for group in groups]

    async def main():
        async with rollouts(advantages=by_turn) as loop:
            return await loop.next_batch()

    batch = virtual_time.run(main())
    assert max(sample.turns.max() for sample in batch.samples) > 0
    for sample in batch.samples:
        assert ((sample.turns >= 0) == (sample.loss_mask > 0)).all()
        assert sample.advantage.tolist() == (sample.turns + 1).tolist()


def test_an_agent_tells_the_state_and_the_reward_of_each_turn():
    seen = []

    def told(groups):
        seen.extend(trajectory for group in groups for trajectory in group)
        return [[np.zeros(()) for _ in group] for group in groups]

    async def main():
        async with rollouts(advantages=told) as loop:
            return await loop.next_batch()

    batch = virtual_time.run(main())
    handed_over = [(sample.reward, sample.turn_rewards) for sample in batch.samples]
    assert handed_over == [(trajectory.reward, trajectory.turn_rewards) for trajectory in seen]
    for trajectory in seen:
        assert len(trajectory.turn_rewards) == len(trajectory.turn_states) == trajectory.turns
        assert sum(trajectory.turn_rewards) == pytest.approx(trajectory.reward)
        assert trajectory.turn_states[0].startswith("task")
        assert set(trajectory.turn_states[1:]) <= {"next"}


@in_virtual_time
async def test_an_episode_that_is_cancelled_by_what_it_called_has_failed():
    """Started again as if the loop had cancelled it, it would be so for ever."""

    class Cancelling(FakeEnvs):
        async def take_time(self):
            raise asyncio.CancelledError

    async with rollouts(envs=Cancelling()) as loop:
        with pytest.raises(RolloutFailure, match="cancelled by what it called"):
            await loop.next_batch()
        assert loop.ledger.outcomes["failed", "agent"] > 0


@in_virtual_time
async def test_an_agent_that_crashes_after_its_report_costs_no_more_than_itself():
    class Twice(EnvironmentAgent):
        async def run(self, report):
            def report_twice(episode, end):
                report(episode, end)
                report(episode, end)

            await super().run(report_twice)

    async with rollouts(agent=Twice, alpha=0) as loop:
        for version in range(1, 4):
            await loop.next_batch()
            await loop.publish(weights(version))
        assert loop.crashes > 0


@in_virtual_time
async def test_an_episode_that_is_given_up_in_the_moment_it_begins_is_reported():
    for given_up in ([Abort], []):
        ends = []
        agent = EnvironmentAgent(envs=FakeEnvs(), style=FakeStyle(), max_tokens=4)
        episode = Episode(0, Task(0), hub=None)
        for message in (Start(episode), *(kind(episode) for kind in given_up), Stop()):
            agent.mailbox.put_nowait(message)
        await agent.run(lambda episode, end: ends.append((episode.id, end)))  # noqa: B023
        assert ends == [(0, Cancelled())]


@in_virtual_time
async def test_an_agent_that_leaves_between_two_episodes_is_given_no_other():
    class Leaving(EnvironmentAgent):
        async def run(self, report):
            message = await self.mailbox.get()
            if isinstance(message, Start):
                await self._live(message.episode, report)

    async with rollouts(agent=Leaving, alpha=0) as loop:
        for version in range(1, 4):
            await loop.next_batch()
            await loop.publish(weights(version))
        assert loop.crashes == 12
        assert loop.ledger.reasons() == {"trained": 12}


@in_virtual_time
async def test_a_close_that_is_cancelled_leaves_no_agent_and_no_count_behind():
    class Reluctant(EnvironmentAgent):
        async def play(self, episode):
            try:
                await asyncio.sleep(1000)
            finally:
                for _ in range(3):
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(5)

    ledgers = []

    async def run():
        async with rollouts(agent=Reluctant) as loop:
            ledgers.append(loop.ledger)
            await loop.next_batch()

    task = asyncio.create_task(run())
    for _ in range(2):  # the second comes while the agents take their time to stop
        await asyncio.sleep(1)
        task.cancel()
    await asyncio.wait([task])
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert ledgers[0].running == 0


@pytest.mark.slow
@in_virtual_time
async def test_thousands_of_agents_run_at_once():
    worker = FakeWorker("w", token_s=(0.5, 1.0))
    async with rollouts(
        worker=worker, batch_size=2000, group_size=4, alpha=1, hub={"max_running": 10_000}
    ) as loop:
        for _ in range(200):
            before = loop.ledger.running
            await asyncio.sleep(0)
            assert loop.ledger.running - before <= 64, "a burst holds the event loop"
        assert loop.ledger.running == 4000
        batch = await loop.next_batch()
        assert len(batch.samples) == 2000
        assert worker.max_running_seen > 2000


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 5}, "batch_size=5"), ({"alpha": -1}, "alpha=-1"),
     ({"alpha": float("nan")}, "alpha=nan")],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(options, message):
    async def main():
        async with rollouts(**options):
            pass

    with pytest.raises(ValueError, match=message):
        virtual_time.run(main())
