"""What the loop tells of episodes that are not trained, and how much they cost."""

import asyncio

import pytest

from flash.agents.environment_agent import EnvironmentAgent
from flash.errors import EnvFailure
from flash.fakes import FakeEnvs, FakeStyle, FakeWorker, KeepingObserver
from flash.hub.hub import InferenceHub
from flash.rollout.loop import RolloutLoop
from flash.types import SamplingParams, Task
from flash.virtual_time import in_virtual_time
from tests.steady import weights

SAMPLING = SamplingParams(max_tokens=4)


def rollouts(hub, agent, **options):
    """A loop of batches of one group of two; what goes well takes 3 s of environment an episode."""
    return RolloutLoop(
        hub,
        agent=lambda: agent(
            envs=FakeEnvs(turns=(2, 2), step_s=(1, 1)), style=FakeStyle(), max_tokens=4
        ),
        tasks=(Task(seed) for seed in range(100)), batch_size=2, group_size=2, **options,
    )  # fmt: skip


@in_virtual_time
async def test_seconds_of_environments_and_agents_are_wasted_where_nothing_is_trained():
    class FirstAttemptsFail(EnvironmentAgent):
        async def play(self, episode):
            if episode.attempt > 1:
                return await super().play(episode)
            with episode.stage("env"):
                await asyncio.sleep(20)
            with episode.stage("agent"):
                await asyncio.sleep(7)
            await episode.generate([2, 3], SAMPLING)
            raise EnvFailure("planned")

    async with (
        InferenceHub([FakeWorker("w", token_s=(1, 1))]) as hub,
        rollouts(hub, FirstAttemptsFail, alpha=0) as loop,
    ):
        await loop.next_batch()
        assert loop.ledger.reasons() == {"failed(env)": 2, "trained": 2}
        assert loop.ledger.metrics()["waste/env_s"] == pytest.approx(2 * (20 + 7))


@in_virtual_time
async def test_an_episode_that_does_not_end_well_tells_its_oldest_and_newest_version():
    published = asyncio.Event()
    fates = iter(["failed", "cancelled"])

    class SampleTwice(EnvironmentAgent):
        async def play(self, episode):
            if episode.task.seed > 0 or (fate := next(fates, None)) is None:
                return await super().play(episode)
            await episode.generate([2, 3], SAMPLING)
            await published.wait()
            await episode.generate([2, 3], SAMPLING)
            if fate == "cancelled":
                await asyncio.Event().wait()
            raise EnvFailure("planned")

    records = []
    async with (
        InferenceHub([FakeWorker("w")]) as hub,
        rollouts(hub, SampleTwice, alpha=2, observers=[KeepingObserver(records)]) as loop,
    ):
        await loop.next_batch()
        await loop.publish(weights(1))
        published.set()
        await asyncio.sleep(100)
    told = [
        (record.outcome, record.version_min, record.version_max)
        for record in records
        if record.seed == 0 and record.attempt == 1
    ]
    assert told == [("failed", 0, 1), ("cancelled", 0, 1)]


@in_virtual_time
async def test_a_publish_frees_the_slots_of_the_batches_before_it_and_of_no_other():
    async with (
        InferenceHub([FakeWorker("w")]) as hub,
        rollouts(hub, EnvironmentAgent, alpha=2) as loop,
    ):
        await loop.next_batch()
        await loop.next_batch()  # before the weights of the first: the bound allows it
        for version, under_way in ((1, 4), (2, 6)):
            await loop.publish(weights(version))
            assert loop.ledger.running + loop.ledger.ready == under_way
