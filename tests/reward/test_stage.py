"""The reward stage: room, deadlines, retries, and failures that are no reward of 0."""

import asyncio
import contextlib
import itertools
import sys
from collections import Counter
from pathlib import Path

import pytest

from flash import virtual_time
from flash.agents.environment_agent import EnvironmentAgent
from flash.agents.external import ExternalAgent
from flash.errors import InferenceFailure
from flash.fakes import FakeEnvs, FakeStyle, FakeWorker, KeepingObserver
from flash.hub.hub import InferenceHub
from flash.reward.stage import FunctionScorer, RewardStage
from flash.rollout.loop import RolloutLoop
from flash.types import Task, Weights
from flash.virtual_time import in_virtual_time
from tests.loops import loop_options


def decode(token_ids):
    return " ".join(map(str, token_ids))


@contextlib.asynccontextmanager
async def rollouts(stage, *, envs=None, hub=None, **options):
    envs = envs or FakeEnvs(turns=(2, 2), step_s=(1, 1))

    def make_agent():
        return EnvironmentAgent(
            envs=envs, style=FakeStyle(), max_tokens=4, episode_timeout_s=1e6, reward_stage=stage
        )

    options = {"batch_size": 4, "group_size": 2, "alpha": 1, **options}
    tasks = (Task(seed) for seed in range(10**6))
    hub = hub or InferenceHub([FakeWorker("w", script=lambda *_: [7, 8])])
    async with (
        hub,
        RolloutLoop(hub, agent=make_agent, tasks=tasks, **loop_options(**options)) as loop,
    ):
        yield loop


def stage_of(function, **options):
    return RewardStage(FunctionScorer(function), decode=decode, **options)


def test_the_stage_replaces_the_reward_and_sees_what_was_read_and_said():
    seen = []

    async def score(transcript):
        seen.append(transcript)
        return {"reward": 0.25, "success": transcript.task.seed == 1}

    trajectories = []

    def told(groups):
        trajectories.extend(t for group in groups for t in group)
        return [[0.0 for _ in group] for group in groups]

    async def main():
        async with rollouts(stage_of(score), advantages=told) as loop:
            return await loop.next_batch()

    batch = virtual_time.run(main())
    assert {sample.reward for sample in batch.samples} == {0.25}
    assert seen[0].text == "2 3 4 7 8 5 6 7 8"
    assert seen[0].responses == ("7 8", "7 8")
    assert [t.turn_rewards for t in trajectories] == [[0.0, 0.25]] * 4
    assert sorted(t.success for t in trajectories) == [False, False, True, True]
    assert batch.metrics["time/reward_s"] == 0


def test_what_the_function_says_nothing_of_is_as_the_environment_said():
    async def score(transcript):
        return transcript.reward + 10 + transcript.success

    async def main():
        async with rollouts(stage_of(score)) as loop:
            return await loop.next_batch()

    batch = virtual_time.run(main())
    assert {sample.reward for sample in batch.samples} <= {10.0, 12.0}
    assert batch.metrics["success_rate"] == share_of(batch, 12.0)


def share_of(batch, reward):
    return sum(sample.reward == reward for sample in batch.samples) / len(batch.samples)


@pytest.mark.parametrize(
    "broken",
    [
        lambda: None,
        lambda: float("nan"),
        lambda: "1.0",
        lambda: {"score": 1},
        lambda: 1 / 0,
        lambda: sys.exit(1),
    ],
    ids=["nothing", "nan", "text", "no reward", "raises", "exits"],
)
def test_a_reward_that_fails_is_a_failed_episode_and_never_a_reward_of_0(broken):
    calls = Counter()

    async def score(transcript):
        calls[transcript.task.seed] += 1
        return broken() if calls[transcript.task.seed] <= 2 else 1.0

    async def main():
        records = []
        async with rollouts(
            stage_of(score, retries=0), alpha=0, observers=[KeepingObserver(records)]
        ) as loop:
            batch = await loop.next_batch()
        return batch, records

    batch, records = virtual_time.run(main())
    outcomes = Counter((r.outcome, r.reason) for r in records)
    assert outcomes[("failed", "reward")] == 4
    assert {sample.reward for sample in batch.samples} == {1.0}
    assert all(r.reward is None for r in records if r.outcome == "failed")


def test_an_attempt_that_fails_or_takes_too_long_is_made_again():
    async def main(retries):
        attempts = itertools.count()

        async def score(transcript):
            if next(attempts) < 8:  # the first two of each of four episodes
                await asyncio.Event().wait()
            return 1.0

        records = []
        stage = stage_of(score, retries=retries, timeout_s=30)
        async with rollouts(
            stage, alpha=0, observers=[KeepingObserver(records)], max_attempts=1
        ) as loop:
            await loop.next_batch()
        return Counter((r.outcome, r.reason) for r in records)

    assert virtual_time.run(main(2)) == {("trained", ""): 4}
    assert virtual_time.run(main(1)) == {("failed", "reward"): 4, ("trained", ""): 4}


def test_only_so_many_are_scored_at_a_time_and_waiting_is_not_on_the_clock():
    now = most = 0

    async def score(transcript):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(20)
        now -= 1
        return 1.0

    async def main():
        records = []
        stage = stage_of(score, concurrency=2, timeout_s=25, retries=0)
        async with rollouts(
            stage, batch_size=16, alpha=0, observers=[KeepingObserver(records)]
        ) as loop:
            await loop.next_batch()
        return records, asyncio.get_running_loop().time()

    records, took_s = virtual_time.run(main())
    assert most == 2
    assert {r.outcome for r in records} == {"trained"}
    assert took_s > 8 * 20


@in_virtual_time
async def test_generation_of_others_goes_on_while_a_reward_takes_its_time():
    async def score(transcript):
        if transcript.task.seed == 0:
            await asyncio.sleep(1000)
        return 1.0

    async with rollouts(stage_of(score, timeout_s=1e4)) as loop:
        for version in range(1, 4):
            batch = await loop.next_batch()
            assert 0 not in {sample.group for sample in batch.samples}
            await loop.publish(Weights(version=version, path=Path("/fake")))
        assert asyncio.get_running_loop().time() < 100


@in_virtual_time
async def test_what_no_episode_can_be_blamed_for_ends_the_run():
    async def score(transcript):
        raise InferenceFailure("no worker is left to judge")

    async with rollouts(stage_of(score)) as loop:
        with pytest.raises(InferenceFailure, match="left to judge"):
            await loop.next_batch()


def test_an_agent_of_somebody_elses_is_scored_too():
    async def score(transcript):
        return len(transcript.responses) + transcript.reward

    stage = stage_of(score)

    class Doorless(ExternalAgent):
        async def play(self, episode):
            inner = EnvironmentAgent(
                envs=FakeEnvs(turns=(1, 1)), style=FakeStyle(), max_tokens=4, episode_timeout_s=1e6
            )
            return await inner.play(episode)

    async def main():
        hub = InferenceHub([FakeWorker("w")])
        tasks = (Task(seed) for seed in range(10**6))

        def make_agent():
            return Doorless(door=None, act=None, max_tokens=4, reward_stage=stage)

        async with (
            hub,
            RolloutLoop(
                hub, agent=make_agent, tasks=tasks, batch_size=2, group_size=2, alpha=0
            ) as loop,
        ):
            return await loop.next_batch()

    batch = virtual_time.run(main())
    assert {sample.reward for sample in batch.samples} <= {1.0, 2.0}


def test_impossible_settings_are_refused_by_name():
    for options, message in (
        ({"concurrency": 0}, "concurrency=0 must be at least 1"),
        ({"retries": -1}, "retries=-1 at least 0"),
        ({"timeout_s": 0}, "timeout_s=0 above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            stage_of(None, **options)
