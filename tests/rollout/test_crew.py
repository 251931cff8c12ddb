"""The seam between a loop and what plays its episodes."""

import asyncio

import pytest

from flash.agents import EnvironmentAgent
from flash.conversation import TokenSequence
from flash.errors import AgentFailure, InferenceFailure
from flash.fakes import FakeCrew, FakeEnvs, FakeStyle, FakeWorker, KeepingObserver
from flash.hub.hub import InferenceHub
from flash.rollout.config import RolloutSettings
from flash.rollout.crew import AgentCrew
from flash.rollout.loop import RolloutLoop
from flash.types import Completion, Task, Trajectory
from flash.virtual_time import in_virtual_time
from tests.steady import weights

TASKS = [Task(seed) for seed in range(100)]
SIZES = {"batch_size": 4, "group_size": 2, "tasks": TASKS}


def played(version: int, reward: float = 1.0) -> Trajectory:
    """One turn, of which a crew far away tells."""
    tokens = TokenSequence([1, 2])
    tokens.add_sampled(
        Completion(
            token_ids=[3, 4],
            logprobs=[-1.0, -1.0],
            versions=[version, version],
            temperature=1.0,
            finish_reason="stop",
        )
    )
    return Trajectory(sequences=[tokens.snapshot()], reward=reward, turns=1)


@in_virtual_time
async def test_a_loop_is_fed_by_any_crew_under_the_same_bound():
    async with InferenceHub([FakeWorker("w")]) as hub:
        crew = FakeCrew(hub, lambda episode: played(hub.version, reward=episode.task.seed % 2))
        kept = KeepingObserver()
        async with RolloutLoop(hub, crew=crew, alpha=1, observers=[kept], **SIZES) as loop:
            assert len(crew.episodes()) == loop.capacity == 8
            for version in range(1, 4):
                batch = await loop.next_batch()
                assert batch.metrics["staleness/max"] <= 1
                assert {sample.reward for sample in batch.samples} == {0.0, 1.0}
                await loop.publish(weights(version))
    assert crew.episodes() == []
    assert loop.ledger.count("trained") == 12
    assert len(kept.records) == loop.ledger.begun == len(crew.begun)


@in_virtual_time
async def test_what_a_crew_tells_of_too_old_a_version_is_in_no_batch():
    async with InferenceHub([FakeWorker("w")]) as hub:
        crew = FakeCrew(
            hub,
            lambda episode: played(0 if episode.task.seed == 2 else hub.version),
            seconds=lambda episode: 100.0 if episode.task.seed == 2 else 1.0,
        )
        settings = RolloutSettings(on_stale="drop")
        async with RolloutLoop(hub, crew=crew, settings=settings, alpha=1, **SIZES) as loop:
            for version in range(1, 4):
                batch = await loop.next_batch()
                assert 2 not in {sample.group for sample in batch.samples}
                await loop.publish(weights(version))
            await asyncio.sleep(100)  # it has ended by now, on version 0
            batch = await loop.next_batch()
            assert 2 not in {sample.group for sample in batch.samples}
            assert loop.ledger.outcomes["dropped", "stale"] == 2


@in_virtual_time
async def test_what_is_found_too_old_last_of_all_is_played_again():
    """Nothing else runs that could call for it."""
    async with InferenceHub([FakeWorker("w")]) as hub:
        crew = FakeCrew(
            hub,
            lambda episode: played(0 if episode.id == 4 else hub.version),
            seconds=lambda episode: 10.0 if episode.id == 4 else 1.0,
        )
        settings = RolloutSettings(on_stale="regenerate")
        async with RolloutLoop(hub, crew=crew, settings=settings, alpha=0, **SIZES) as loop:
            await loop.next_batch()
            await loop.publish(weights(1))
            async with asyncio.timeout(60):
                batch = await loop.next_batch()
            assert sorted(sample.episode for sample in batch.samples) == [5, 6, 7, 8]


@in_virtual_time
async def test_failures_and_a_lost_crew_end_as_those_of_agents_do():
    async with InferenceHub([FakeWorker("w")]) as hub:
        crew = FakeCrew(hub, lambda episode: AgentFailure("elsewhere"))
        async with RolloutLoop(hub, crew=crew, **SIZES) as loop:
            await asyncio.sleep(1.5)
            assert loop.ledger.count("failed") == 8
            assert {episode.attempt for episode in crew.episodes()} == {2}
            waiting = asyncio.create_task(loop.next_batch())
            await asyncio.sleep(0)
            crew.fail(InferenceFailure("the explorer is gone"))
            with pytest.raises(InferenceFailure, match="the explorer is gone"):
                await waiting
    assert loop.ledger.running == 0


@in_virtual_time
async def test_a_loop_that_nobody_plays_for_is_refused():
    async with InferenceHub([FakeWorker("w")]) as hub:
        with pytest.raises(ValueError, match="nobody plays: give agent="):
            RolloutLoop(hub, **SIZES)


@pytest.mark.parametrize("fail_rate", [0.0, 1.0])
@in_virtual_time
async def test_episodes_are_starting_until_they_first_ask_for_tokens(fail_rate):
    envs = FakeEnvs(turns=(2, 2), step_s=(1.0, 1.0), fail_rate=fail_rate)
    worker = FakeWorker("w", token_s=(1.0, 1.0), tokens=(1, 1))
    ends = []
    async with InferenceHub([worker]) as hub:
        crew = AgentCrew(lambda: EnvironmentAgent(envs=envs, style=FakeStyle(), max_tokens=1), hub)
        crew.report_to(on_end=lambda _, end: ends.append(end), on_fatal=ends.append)
        async with crew:
            for number in range(3):
                crew.begin(number, Task(number))
            await asyncio.sleep(0.5)
            assert crew.starting == 3
            for _ in range(5):
                await asyncio.sleep(1.0)
                assert crew.starting == 0
    assert len(ends) == 3
