"""The hand-over of a batch: in turns of the event loop, between which anything may happen."""

import asyncio
import contextlib
import random
from collections import Counter

import numpy as np
import pytest

from flash.conversation import TokenSequence
from flash.errors import AgentFailure
from flash.fakes import FakeCrew, FakeWorker
from flash.hub.hub import InferenceHub
from flash.hub.reports import PublishReport
from flash.rollout import choosing
from flash.rollout.choosing import choose_groups
from flash.rollout.config import RolloutSettings
from flash.rollout.loop import RolloutLoop
from flash.rollout.observer import Observer
from flash.rollout.tasks import TaskSet
from flash.trainer.advantage_settings import Grpo, Reinforce
from flash.trainer.advantages import make_advantages
from flash.types import Completion, Task, Trajectory
from flash.virtual_time import in_virtual_time
from tests.steady import weights

BATCH, GROUP = 600, 4


class Books(Observer):
    """What a loop told: who ended how, which batches there were, how much was under way."""

    def __init__(self):
        self.outcomes = {}
        self.batches = []
        self.trained_in = Counter()  # by turn of the event loop
        self.turn = 0
        self.after_each = lambda: None

    def watch(self, loop):
        self._loop = loop

    def ended(self, episode, record):
        assert episode.id not in self.outcomes, "a second outcome"
        self.outcomes[episode.id] = record.outcome
        self.trained_in[self.turn] += record.outcome == "trained"
        if record.outcome == "trained":
            self.after_each()

    def handed_over(self, batch):
        self.batches.append(batch)
        if batch.last:
            ended = [self.outcomes[sample.episode] for sample in batch.samples]
            assert ended == ["trained"] * len(ended)
            ledger = self._loop.ledger
            assert ledger.running + ledger.ready + BATCH <= self._loop.capacity

    def count(self, outcome):
        return Counter(self.outcomes.values())[outcome]


@contextlib.asynccontextmanager
async def rollouts(
    books, *, kind=InferenceHub, play=None, seconds=lambda episode: 1.0, alpha=1, **options
):
    async with kind([FakeWorker("w")]) as hub:
        crew = FakeCrew(hub, play or (lambda episode: said([hub.version] * 2)), seconds=seconds)
        async with RolloutLoop(
            hub, crew=crew, tasks=map(Task, range(10**6)), batch_size=BATCH, group_size=GROUP,
            alpha=alpha, observers=[books], **options,
        ) as loop:  # fmt: skip
            books.watch(loop)
            yield loop


def said(versions, reward=1.0):
    tokens = TokenSequence([1, 2])
    tokens.add_sampled(
        Completion(
            token_ids=[3] * len(versions), logprobs=[-1.0] * len(versions), versions=versions,
            temperature=1.0, finish_reason="stop",
        )
    )  # fmt: skip
    return Trajectory(sequences=[tokens.snapshot()], reward=reward, turns=1)


async def turns_of(books, call):
    """Counts the turns that the event loop takes until the call has returned."""
    calling = asyncio.ensure_future(call)
    while not calling.done():
        books.turn += 1
        await asyncio.sleep(0)
    return await calling


@in_virtual_time
async def test_no_turn_of_the_event_loop_has_many_episodes_of_a_hand_over():
    books = Books()
    async with rollouts(books) as loop:
        await asyncio.sleep(10)  # all are ready
        batch = await turns_of(books, loop.next_batch())
        assert len(batch.samples) == books.trained_in.total() == BATCH
        assert max(books.trained_in.values()) <= 200


@pytest.mark.parametrize("settings", [Grpo(), Reinforce(baseline="batch")])
@in_virtual_time
async def test_a_batch_and_its_numbers_are_those_of_one_turn(settings):
    rng, books = random.Random(0), Books()
    rewards = {}

    def play(episode):
        newest = loop.hub.version
        rewards[episode.id] = rng.random()
        versions = [rng.randint(max(0, newest - 1), newest) for _ in range(rng.randint(0, 3))]
        return said(versions, rewards[episode.id])

    seconds = lambda episode: rng.uniform(1, 3)  # noqa: E731
    advantages = make_advantages(settings)
    async with rollouts(books, play=play, seconds=seconds, alpha=2, advantages=advantages) as loop:
        for version in range(4):
            batch = await loop.next_batch()
            metrics, samples = batch.metrics, batch.samples
            ages = version - np.concatenate([s.versions[s.loss_mask > 0] for s in samples])
            assert metrics["staleness/mean"] == ages.mean()
            assert metrics["staleness/max"] == ages.max()
            assert metrics["staleness/histogram"] == np.bincount(ages).tolist()
            of_all = [rewards[sample.episode] for sample in samples]
            assert metrics["reward/mean"] == np.mean(of_all)
            groups = [samples[at : at + GROUP] for at in range(0, BATCH, GROUP)]
            assert all(len({sample.group for sample in group}) == 1 for group in groups)
            (expected,) = advantages([[said([], reward) for reward in of_all]])
            if settings.name == "grpo":
                expected = [
                    advantage
                    for group in groups
                    for advantage in advantages([[said([], s.reward) for s in group]])[0]
                ]
            found = [sample.advantage for sample in samples]
            assert found == [float(advantage) for advantage in expected]
            await loop.publish(weights(version + 1))


@pytest.mark.parametrize("take", ["next_batch", "next_part"])
@in_virtual_time
async def test_a_call_that_is_cancelled_in_mid_hand_over_loses_nothing(take):
    books = Books()
    async with rollouts(books, alpha=3) as loop:
        await asyncio.sleep(10)
        cancelled = 0
        for after in range(100):
            calling = asyncio.ensure_future(getattr(loop, take)())
            for _ in range(after % 12):
                await asyncio.sleep(0)
            if not calling.done():
                calling.cancel()
                cancelled += 1
                await asyncio.wait([calling])
                continue
            version = (await calling).version
            assert [batch.version for batch in books.batches] == list(range(version + 1))
            assert books.count("trained") == BATCH * (version + 1)
            assert len({s.episode for b in books.batches for s in b.samples}) == BATCH * (
                version + 1
            )
            await loop.publish(weights(version + 1))
            await asyncio.sleep(10)
        assert cancelled > 10
        assert len(books.batches) > 3
    assert len(books.outcomes) == loop.ledger.begun


@pytest.mark.parametrize("after", range(16))
@in_virtual_time
async def test_a_loop_that_is_left_in_mid_hand_over_trains_all_of_a_batch_or_nothing(after):
    books = Books()
    async with rollouts(books) as loop:
        await asyncio.sleep(10)
        calling = asyncio.ensure_future(loop.next_batch())
        for _ in range(after):
            await asyncio.sleep(0)
        calling.cancel()
        await asyncio.wait([calling])
    assert books.count("trained") == BATCH * len(books.batches)
    assert books.count("trained") + books.count("dropped") == 2 * BATCH == loop.ledger.begun


@in_virtual_time
async def test_no_episode_begins_in_the_place_of_one_that_is_handed_over():
    books = Books()
    async with rollouts(books) as loop:
        # As an episode that ends meanwhile does.
        books.after_each = lambda: asyncio.get_running_loop().call_soon(loop.use_alpha, 1)
        for version in range(1, 4):
            await loop.next_batch()  # `Books` looks to the bound
            await loop.publish(weights(version))


@in_virtual_time
async def test_what_is_handed_over_is_not_given_up_for_weights_of_a_later_version():
    class PublishesAtOnce(InferenceHub):
        async def publish(self, weights):
            return PublishReport(
                version=weights.version, gap=None, paused_s=0.0, load_s=0.0, reset_s=0.0,
                workers=1, per_worker=(),
            )  # fmt: skip

    books = Books()
    async with rollouts(books, kind=PublishesAtOnce, alpha=0) as loop:
        await asyncio.sleep(10)
        calling = asyncio.ensure_future(loop.next_batch())
        while books.count("trained") == 0:
            await asyncio.sleep(0)
        await loop.publish(weights(7))
        assert not calling.done()
        batch = await calling
        assert (batch.version, len(batch.samples)) == (0, BATCH)
        assert books.count("trained") == BATCH
        assert loop.admission_state().next_version == 7


@in_virtual_time
async def test_groups_are_chosen_from_again_only_where_one_of_them_has_come_or_gone(monkeypatch):
    books, choices = Books(), []

    def counted(*args, **options):
        choices.append(1)
        return choose_groups(*args, **options)

    def seconds(episode):
        late = {0: 50.0, GROUP: 60.0}  # of the groups 0 and 1
        return late.get(episode.id, 1 + episode.id * 7919 % 1009 / 1009)

    monkeypatch.setattr(choosing, "choose_groups", counted)
    settings = RolloutSettings(on_stale="wait")
    async with rollouts(books, seconds=seconds, alpha=2, settings=settings) as loop:
        for version in (1, 2):
            await loop.next_batch()
            await loop.publish(weights(version))
        choices.clear()
        batch = await loop.next_batch()
        assert {0, 1} <= {sample.group for sample in batch.samples}, "they were waited for"
        assert len(choices) == 2, "when there were enough of others, and when both had come"


@in_virtual_time
async def test_nobody_waits_for_a_group_that_was_given_up():
    books, clock = Books(), asyncio.get_running_loop().time

    def fails(episode):
        return episode.group == 0 and episode.id % GROUP == 0

    def play(episode):
        return AgentFailure("no") if fails(episode) else said([loop.hub.version] * 2)

    def seconds(episode):
        return 50.0 if fails(episode) else 1 + episode.id * 7919 % 1009 / 1009

    settings = RolloutSettings(on_stale="wait", max_attempts=1)
    async with rollouts(books, play=play, seconds=seconds, alpha=2, settings=settings) as loop:
        for version in (1, 2):
            await loop.next_batch()
            await loop.publish(weights(version))
        batch = await loop.next_batch()
        assert 0 not in {sample.group for sample in batch.samples}
        assert clock() == pytest.approx(50.0)


@in_virtual_time
async def test_a_part_is_what_is_complete_of_one_task_set_while_another_waits_for_its_late_groups():
    """Each set has two batches' groups at first, of which half is quick and half are late; for
    those of `a`, which have begun to sample, the next batch keeps all places of theirs."""
    books, clock = Books(), asyncio.get_running_loop().time
    groups, seen = BATCH // GROUP // 2, set()

    def seconds(episode):
        if not groups <= episode.task.seed < 2 * groups:
            return 1.0
        if episode.task.task_set == "b":
            return 20.0
        first = episode.group not in seen
        seen.add(episode.group)
        return 50.0 if first else 1.0

    sets = [
        TaskSet(
            name=name, tasks=[Task(seed, task_set=name) for seed in range(tasks * groups)],
            groups_per_batch=groups, group_size=GROUP,
        )
        for name, tasks in (("a", 5), ("b", 2))
    ]  # fmt: skip
    settings = RolloutSettings(on_stale="wait")
    async with rollouts(books, seconds=seconds, task_sets=sets, settings=settings) as loop:
        await loop.next_batch()
        await loop.publish(weights(1))
        part = await loop.next_part()
        assert clock() == pytest.approx(20.0)
        assert len(part.samples) == BATCH / 2
