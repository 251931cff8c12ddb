"""A loop that goes on with what an earlier one had under way, under virtual time."""

import asyncio
import contextlib
from collections import Counter

from flash.agents.environment_agent import EnvironmentAgent
from flash.fakes import FakeEnvs, FakeStyle, FakeWorker, KeepingObserver
from flash.fakes.samples import fake_sample
from flash.hub.hub import InferenceHub
from flash.rollout.loop import RolloutLoop
from flash.rollout.restored import DueEpisode, OpenGroup, ReadyEpisode, Restored
from flash.types import Batch, Task, Trajectory
from flash.virtual_time import in_virtual_time
from tests.loops import loop_options
from tests.steady import weights


def trajectory(reward: float) -> Trajectory:
    sequence = fake_sample([1, 2])
    return Trajectory(sequences=[sequence], reward=reward, turns=1, success=False)


def ready(episode: int) -> ReadyEpisode:
    return ReadyEpisode(
        episode=episode,
        attempt=1,
        trajectory=trajectory(float(episode)),
        prompt_tokens=1,
        generated_tokens=1,
    )


def handed_over(version: int, *, last: bool = True) -> Batch:
    return Batch(samples=[fake_sample([1, 2])], version=version, last=last, metrics={})


@contextlib.asynccontextmanager
async def resumed(restored: Restored, **options):
    observer = KeepingObserver()

    def make_agent():
        return EnvironmentAgent(envs=FakeEnvs(), style=FakeStyle(), max_tokens=4)

    options = {"batch_size": 4, "group_size": 2, "alpha": 1, **options}
    options["tasks"] = (Task(seed) for seed in range(100, 10**6))
    async with (
        InferenceHub([FakeWorker("w")]) as hub,
        RolloutLoop(
            hub,
            agent=make_agent,
            restored=restored,
            observers=[observer],
            **loop_options(**options),
        ) as loop,
    ):
        yield loop, observer


@in_virtual_time
async def test_what_was_ready_and_what_is_due_make_a_whole_group():
    group = OpenGroup(group=3, task=Task(7), ready=[ready(11)], due=[DueEpisode()])
    async with resumed(Restored(groups=[group], first_ids=(20, 4))) as (loop, _):
        batch = await loop.next_batch()
        of_group = [s.episode for s in batch.samples if s.group == 3]
        assert of_group[0] == 11
        assert of_group[1] >= 20
        assert Counter(s.group for s in batch.samples).most_common(1)[0][1] == 2


@in_virtual_time
async def test_of_more_ready_episodes_than_a_group_takes_the_first_are_trained():
    group = OpenGroup(group=3, task=Task(7), ready=[ready(12), ready(10), ready(11)])
    restored = Restored(groups=[group], first_ids=(20, 4))
    async with resumed(restored, redundant_episodes=1) as (loop, observer):
        batch = await loop.next_batch()
        assert [s.episode for s in batch.samples if s.group == 3] == [12, 10]
        (record,) = [record for record in observer.records if record.episode == 11]
        assert (record.outcome, record.reason) == ("dropped", "redundant")


@in_virtual_time
async def test_a_group_that_can_not_be_whole_any_more_is_given_up():
    groups = [
        OpenGroup(group=3, task=Task(7), ready=[ready(11)]),  # the other failed too often
        OpenGroup(group=4, task=Task(8), ready=[ready(12), ready(13)]),
    ]
    async with resumed(Restored(groups=groups, first_ids=(20, 5))) as (loop, observer):
        assert {s.group for s in (await loop.next_batch()).samples} == {4, 5}
        (record,) = [record for record in observer.records if record.episode == 11]
        assert (record.outcome, record.reason) == ("dropped", "group_failed")


@in_virtual_time
async def test_a_batch_that_is_to_be_trained_holds_its_slots_from_the_start():
    async with resumed(Restored(batches=[handed_over(0)])) as (loop, _):
        assert loop.ledger.running == 4, "of (1+α)·4 slots the batch has 4"
        assert (await loop.next_batch()).version == 0
        assert loop.ledger.running + loop.ledger.ready == 4
        await loop.publish(weights(1))
        assert loop.ledger.running + loop.ledger.ready == 8


@in_virtual_time
async def test_a_batch_that_was_handed_over_in_parts_is_whole_for_who_takes_it_whole():
    parts = [handed_over(0, last=False), handed_over(0, last=False), handed_over(0)]
    async with resumed(Restored(batches=parts)) as (loop, _):
        batch = await loop.next_batch()
        of_parts = [sample for part in parts for sample in part.samples]
        assert [id(sample) for sample in batch.samples] == [id(sample) for sample in of_parts]
        assert (batch.version, batch.last) == (0, True)
        assert (await loop.next_batch()).version == 1


@in_virtual_time
async def test_nothing_begins_for_batches_after_the_last_when_that_is_to_be_trained_still():
    async with resumed(Restored(batches=[handed_over(0)]), last_version=1) as (loop, _):
        await asyncio.sleep(100)
        assert loop.ledger.begun == 0


@in_virtual_time
async def test_at_alpha_zero_nothing_begins_until_the_batch_is_trained():
    parts = [handed_over(0, last=False), handed_over(0)]
    async with resumed(Restored(batches=parts), alpha=0) as (loop, _):
        assert loop.ledger.running == 0
        assert [(await loop.next_part()).last for _ in parts] == [False, True]
        assert loop.ledger.running == 0
        await loop.publish(weights(1))
        assert loop.ledger.running == 4


@in_virtual_time
async def test_with_a_smaller_alpha_than_before_groups_go_on_one_after_another_and_none_blocks():
    """Under α=1 four groups were half done; of α=0 their ready halves would take all slots."""
    groups = [
        OpenGroup(group=n, task=Task(n), ready=[ready(n)], due=[DueEpisode()]) for n in range(4)
    ]
    restored = Restored(groups=groups, first_ids=(20, 4))
    async with resumed(restored, alpha=0, stall_timeout_s=100) as (loop, observer):
        trained = []
        for version in (1, 2, 3):
            trained.append({sample.group for sample in (await loop.next_batch()).samples})
            assert loop.ledger.running + loop.ledger.ready == 0
            await loop.publish(weights(version))
    assert trained == [{0, 1}, {2, 3}, {4, 5}]
    assert {record.group for record in observer.records if record.reason == "shutdown"} <= {6, 7}
