"""Several task sets in one loop, under virtual time: each has its part of every batch."""

import asyncio
import contextlib
import itertools
from collections import Counter

import pytest

from flash.agents.environment_agent import EnvironmentAgent
from flash.conversation import TokenSequence
from flash.errors import RolloutFailure
from flash.fakes import FakeCrew, FakeEnvs, FakeStyle, FakeWorker, KeepingObserver
from flash.hub.hub import InferenceHub
from flash.rollout.config import RolloutSettings
from flash.rollout.loop import RolloutLoop
from flash.rollout.restored import DueEpisode, OpenGroup, ReadyEpisode, Restored
from flash.rollout.tasks import Tasks, TaskSet
from flash.types import Batch, Completion, Task, ToolUse, Trajectory
from flash.virtual_time import in_virtual_time
from tests.steady import weights


def task_set(name: str, groups: int, size: int, *, tasks: int | None = None, **more) -> TaskSet:
    seeds = itertools.count() if tasks is None else range(tasks)
    found = (Task(seed) for seed in seeds)
    return TaskSet(name=name, tasks=found, groups_per_batch=groups, group_size=size, **more)


def played(version: int, reward: float = 1.0, tokens: int = 2) -> Trajectory:
    sequence = TokenSequence([1, 2])
    sequence.add_sampled(
        Completion(
            token_ids=[3] * tokens,
            logprobs=[-1.0] * tokens,
            versions=[version] * tokens,
            temperature=1.0,
            finish_reason="stop",
        )
    )
    return Trajectory(sequences=[sequence.snapshot()], reward=reward, turns=1, success=reward > 0)


def no_advantage(groups):
    """Also of groups of one."""
    return [[0.0] * len(group) for group in groups]


@contextlib.asynccontextmanager
async def loop_of(*sets: TaskSet, play=None, seconds=lambda episode: 1.0, alpha=1, **options):
    """A loop whose episodes only take time, with its crew and what it tells."""
    kept = KeepingObserver()
    settings = RolloutSettings(**options.pop("settings", {}))
    batch_size = sum(each.groups_per_batch * each.group_size for each in sets)
    async with InferenceHub([FakeWorker("w")]) as hub:
        crew = FakeCrew(hub, play or (lambda episode: played(hub.version)), seconds=seconds)
        async with RolloutLoop(
            hub, crew=crew, task_sets=sets, batch_size=batch_size, alpha=alpha, settings=settings,
            observers=[kept], advantages=no_advantage, **options,
        ) as loop:  # fmt: skip
            yield loop, crew, kept


def mixture(batch: Batch, kept: KeepingObserver) -> Counter[tuple[str, int]]:
    """How many groups of each set, and of how many episodes."""
    of_episode = {record.episode: record.task_set for record in kept.records}
    sizes = Counter((of_episode[sample.episode], sample.group) for sample in batch.samples)
    return Counter((name, size) for (name, _), size in sizes.items())


@in_virtual_time
async def test_every_batch_has_so_many_whole_groups_of_each_set():
    sets = task_set("short", 3, 4), task_set("long", 2, 2), task_set("single", 5, 1)

    def seconds(episode):
        return {"short": 1.0, "long": 7.0, "single": 2.0}[episode.task.task_set]

    async with loop_of(*sets, seconds=seconds) as (loop, _, kept):
        for version in range(6):
            batch = await loop.next_batch()
            assert len(batch.samples) == 3 * 4 + 2 * 2 + 5
            assert mixture(batch, kept) == {("short", 4): 3, ("long", 2): 2, ("single", 1): 5}
            assert batch.metrics["staleness/max"] <= 1
            await loop.publish(weights(version + 1))


@in_virtual_time
async def test_a_set_of_long_episodes_is_not_crowded_out():
    """What of the others is ready waits, and takes none of its slots."""
    sets = task_set("quick", 2, 2), task_set("slow", 2, 2)

    def seconds(episode):
        return 1.0 if episode.task.task_set == "quick" else 100.0

    async with loop_of(*sets, seconds=seconds) as (loop, crew, _):
        assert loop.capacity == 16
        await asyncio.sleep(10)
        assert loop.ledger.ready_of == {"quick": 8}
        assert Counter(episode.task.task_set for episode in crew.episodes()) == {"slow": 8}
        for version in range(3):
            await loop.next_batch()
            assert loop.ledger.running + loop.ledger.ready <= 16 - 8, "the batch holds its slots"
            await loop.publish(weights(version + 1))
        assert loop.ledger.outcomes == {("trained", ""): 24}


@in_virtual_time
async def test_sets_begin_in_turn_so_that_their_groups_lie_mixed_in_a_batch():
    async with loop_of(task_set("a", 4, 1), task_set("b", 2, 1), alpha=0) as (loop, crew, _):
        assert [e.task.task_set for e in crew.begun] == ["a", "b", "a", "a", "b", "a"]
        batch = await loop.next_batch()
        assert [sample.group for sample in batch.samples] == list(range(6))


@in_virtual_time
async def test_parts_are_handed_over_as_they_finish_and_the_last_makes_the_mixture_whole():
    def seconds(episode):
        return 1.0 if episode.task.task_set == "quick" else 50.0

    sets = task_set("quick", 2, 2), task_set("slow", 1, 3)
    async with loop_of(*sets, seconds=seconds) as (loop, _, kept):
        first = await loop.next_part()
        assert (len(first.samples), first.last) == (4, False), "two more of it are ready: too many"
        last = await loop.next_part()
        assert (len(last.samples), last.last) == (3, True)
        assert mixture(last, kept) == {("slow", 3): 1}
        assert last.metrics["share/quick"] == pytest.approx(4 / 7)


@in_virtual_time
async def test_a_set_has_filters_of_its_own():
    def drop(group):
        return group[0].reward < 0.5

    sets = task_set("strict", 1, 2, filters=[drop]), task_set("plain", 1, 2)

    async def rewards(**options):
        async with loop_of(
            *sets, play=lambda episode: played(0, reward=episode.task.seed % 2), alpha=0, **options
        ) as (loop, _, kept):
            await loop.next_batch()
        return Counter((r.task_set, r.outcome, r.reason) for r in kept.records)

    assert await rewards() == {
        ("strict", "dropped", "filtered:drop"): 2,
        ("strict", "trained", ""): 2,
        ("plain", "trained", ""): 2,
    }


@in_virtual_time
async def test_a_set_whose_filters_drop_too_much_is_named():
    sets = task_set("hopeless", 1, 2, filters=[lambda group: True]), task_set("plain", 1, 2)
    async with loop_of(*sets, settings={"max_filtered": 3}) as (loop, _, _):
        with pytest.raises(RolloutFailure, match="dropped 4 groups of task set hopeless and"):
            await loop.next_batch()


@in_virtual_time
async def test_a_set_whose_tasks_have_ended_is_named():
    async with loop_of(task_set("few", 2, 2, tasks=3), task_set("many", 1, 2)) as (loop, _, _):
        await loop.next_batch()
        await loop.publish(weights(1))
        match = "tasks of task set few have ended with 1 groups left, and a batch takes 2"
        with pytest.raises(RolloutFailure, match=match):
            await loop.next_batch()


@in_virtual_time
async def test_numbers_are_told_by_task_set():
    def play(episode):
        poor = episode.task.task_set == "hard"
        return played(0, reward=0.25 if poor else 1.0, tokens=6 if poor else 2)

    async with loop_of(task_set("easy", 1, 2), task_set("hard", 1, 2), play=play) as (loop, _, _):
        told = (await loop.next_batch()).metrics
    assert told["reward/mean"] == 0.625
    assert (told["reward/mean/easy"], told["reward/mean/hard"]) == (1.0, 0.25)
    assert (told["success_rate/easy"], told["turns/mean/hard"]) == (1.0, 1.0)
    assert (told["share/easy"], told["share/hard"]) == (0.25, 0.75)


@in_virtual_time
async def test_calls_of_tools_are_told_by_tool():
    def play(episode):
        episode.tool_uses["add"] = ToolUse(calls=2, errors=1, late=1, seconds=3.0)
        return played(0)

    async with loop_of(task_set("easy", 1, 2), task_set("hard", 1, 2), play=play) as (loop, _, _):
        told = (await loop.next_batch()).metrics
    of_add = {name: told[f"tools/{name}/add"] for name in ("calls", "errors", "late", "seconds")}
    assert of_add == {"calls": 8, "errors": 4, "late": 4, "seconds": 1.5}


@in_virtual_time
async def test_ages_are_told_by_task_set():
    """A quick one is ready when the batch before it is trained, a slow one a version later."""
    sets = task_set("quick", 1, 2), task_set("slow", 3, 2)

    def seconds(episode):
        return {"quick": 1.0, "slow": 8.0}[episode.task.task_set]

    async with loop_of(*sets, seconds=seconds) as (loop, _, _):
        for version in range(6):
            under_way, told = loop.ages(), (await loop.next_batch()).metrics
            await asyncio.sleep(5)
            await loop.publish(weights(version + 1))
    assert (told["staleness/mean/quick"], told["staleness/mean/slow"]) == (1.0, 0.0)
    assert told["staleness/mean"] == 0.25
    assert (told["staleness/max/quick"], told["staleness/max/slow"]) == (1, 0)
    assert under_way == {"quick": {1: 2}, "slow": {}}


@in_virtual_time
async def test_without_task_sets_no_number_is_told_by_them():
    async with loop_of(task_set("", 2, 2)) as (loop, _, _):
        assert not [name for name in (await loop.next_batch()).metrics if name.endswith("/")]


def half_done(group: int, task_set: str, size: int = 2) -> OpenGroup:
    ready = ReadyEpisode(
        episode=group, attempt=1, trajectory=played(0), prompt_tokens=1, generated_tokens=1
    )
    due = [DueEpisode()] * (size - 1)
    return OpenGroup(group=group, task=Task(group, task_set=task_set), ready=[ready], due=due)


@in_virtual_time
async def test_a_set_that_has_no_room_for_its_restored_groups_does_not_block_the_other():
    """With a smaller α than they began under."""
    groups = [half_done(n, "a") for n in range(4)] + [half_done(4, "b", 3)]
    restored = Restored(groups=groups, first_ids=(20, 5))
    sets = task_set("a", 1, 2), task_set("b", 1, 3)
    async with loop_of(*sets, alpha=0, restored=restored) as (loop, _, kept):
        trained = []
        for version in range(5):
            batch = await loop.next_batch()
            assert mixture(batch, kept) == {("a", 2): 1, ("b", 3): 1}
            trained.append({sample.group for sample in batch.samples})
            assert loop.ledger.running + loop.ledger.ready == 0
            await loop.publish(weights(version + 1))
    assert [min(groups) for groups in trained[:4]] == [0, 1, 2, 3]
    assert 4 in trained[0]


@in_virtual_time
async def test_a_group_is_trained_again_in_a_place_of_its_own_set():
    def seconds(episode):
        slow = episode.task.task_set == "a" and episode.task.seed >= 2
        return 30.0 if slow else 1.0

    sets = task_set("a", 2, 2), task_set("b", 2, 2)
    reuse = {"reuse": {"uses": 2, "share": 0.5}}
    async with loop_of(*sets, seconds=seconds, alpha=2, settings=reuse) as (loop, _, kept):
        seen: Counter[int] = Counter()
        for version in range(4):
            batch = await loop.next_batch()
            assert mixture(batch, kept) == {("a", 2): 2, ("b", 2): 2}
            seen.update({sample.group for sample in batch.samples})
            await loop.publish(weights(version + 1))
        of_group = {record.group: record.task_set for record in kept.records}
        again = Counter(of_group[group] for group, batches in seen.items() if batches > 1)
    assert again["a"] > 0
    assert max(seen.values()) == 2


@in_virtual_time
async def test_no_part_but_the_last_has_groups_that_were_trained_before():
    """They fill the places of their set, and another set's are not filled yet."""

    def seconds(episode):
        ready_after = {"a": [1.0, 1.0, 5.0], "b": [1.0, 1.0, 50.0]}[episode.task.task_set]
        return dict(enumerate(ready_after)).get(episode.task.seed, 60.0)

    sets = task_set("a", 2, 2), task_set("b", 2, 2)
    reuse = {"reuse": {"uses": 2, "share": 0.5}}
    async with loop_of(*sets, seconds=seconds, alpha=2, settings=reuse) as (loop, _, kept):
        before = await loop.next_batch()
        await loop.publish(weights(1))
        part = await loop.next_part()
        assert (len(part.samples), part.last) == (2, False)
        last = await loop.next_part()
        assert (len(last.samples), last.last) == (6, True)
        again = {s.group for s in before.samples} & {s.group for s in last.samples}
        assert Counter(record.task_set for record in kept.records if record.group in again) == {
            "a": 2,
            "b": 2,
        }


@in_virtual_time
async def test_agents_of_a_set_play_its_tasks_alone():
    opened: Counter[str] = Counter()

    def maker(name: str):
        envs = FakeEnvs()

        def make():
            opened[name] += 1
            return EnvironmentAgent(envs=envs, style=FakeStyle(), max_tokens=longest[name])

        return make

    longest = {"a": 2, "b": 5}
    sets = task_set("a", 1, 2), task_set("b", 1, 2)
    kept = KeepingObserver()
    async with (
        InferenceHub([FakeWorker("w", tokens=(9, 9))]) as hub,
        RolloutLoop(
            hub, agent={name: maker(name) for name in longest}, task_sets=sets, batch_size=4,
            observers=[kept],
        ) as loop,
    ):  # fmt: skip
        for version in range(3):
            await loop.next_batch()
            await loop.publish(weights(version + 1))
    assert opened == {"a": 4, "b": 4}, "one for each that runs at a time"
    per_turn = {(r.task_set, r.generated_tokens // r.turns) for r in kept.records if r.reward}
    assert per_turn == {("a", 2), ("b", 5)}


async def make(**options):
    async with InferenceHub([FakeWorker("w")]) as hub:
        RolloutLoop(hub, crew=FakeCrew(hub, lambda episode: played(0)), **options)


@in_virtual_time
async def test_sets_that_make_no_batch_are_refused():
    with pytest.raises(ValueError, match="batch_size=8: the groups of task_sets are 6 samples"):
        await make(batch_size=8, task_sets=[task_set("a", 1, 4), task_set("b", 1, 2)])
    with pytest.raises(ValueError, match=r"task_sets=\['a', 'a'\]: give at least one, each with a"):
        await make(batch_size=8, task_sets=[task_set("a", 1, 4), task_set("a", 1, 4)])
    with pytest.raises(ValueError, match="groups_per_batch=0 of task set 'a' must be at least 1"):
        task_set("a", 0, 4)


@in_virtual_time
async def test_a_set_that_nobody_plays_is_refused():
    async with InferenceHub([FakeWorker("w")]) as hub:
        with pytest.raises(ValueError, match=r"agent= makes agents for \['a'\], and tasks are of"):
            RolloutLoop(
                hub, agent={"a": lambda: None}, batch_size=4,
                task_sets=[task_set("a", 1, 2), task_set("b", 1, 2)],
            )  # fmt: skip


def test_each_set_has_an_order_of_its_own_and_goes_on_in_it():
    def seeds(name, count=5, **begun):
        tasks = itertools.islice(Tasks(7, task_set=name, **begun), count)
        return [(task.task_set, task.seed) for task in tasks]

    first, other = seeds("a"), seeds("b")
    assert first == seeds("a")
    assert {name for name, _ in first} == {"a"}
    assert not {seed for _, seed in first} & {seed for _, seed in other}
    begun = [seed for _, seed in first[:3]]
    assert seeds("a", 3, dispatched=begun, again=begun[1:2]) == [first[1], *first[3:]]
