"""Groups that are trained more than once, one promise at a time, under virtual time."""

import asyncio
import contextlib
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from flash.errors import RolloutFailure
from flash.fakes import FakeCrew, FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.config import ReuseConfig, RolloutSettings
from flash.rollout.episode import Episode
from flash.rollout.groups import Group
from flash.rollout.ledger import Ledger
from flash.rollout.loop import RolloutLoop
from flash.rollout.restored import ReadyEpisode, Restored, UsedGroup
from flash.rollout.reuse import Reuse, TrainedGroup, find_priority
from flash.rollout.slots import Slots
from flash.simulate import Scenario, simulate
from flash.telemetry.folder import read_lines
from flash.types import Batch, Task
from flash.virtual_time import in_virtual_time
from tests.rollout.slow_lake import SlowLake
from tests.rollout.test_crew import played
from tests.steady import weights
from tests.tiny_runs import run, tiny

NEVER_S = 1e6
ON = {"uses": 2, "share": 0.5}


def of_groups(times: dict[int, float], otherwise: float) -> Callable[[int], float]:
    return lambda group: times.get(group, otherwise)


@contextlib.asynccontextmanager
async def rollouts(
    seconds: Callable[[int], float] = lambda group: 1.0,
    *,
    reuse: dict[str, Any] | None = None,
    alpha: float = 2,
    tasks: int = 10**6,
    rewards: Callable[[int, int], float] = lambda group, number: float(number % 2),
    on_stale: str = "regenerate",
    restored: Restored | None = None,
    last_version: int | None = None,
) -> AsyncIterator[RolloutLoop]:
    """Four groups of two in a batch; a group takes its seconds, and is of the version then."""
    async with InferenceHub([FakeWorker("w")]) as hub:
        crew = FakeCrew(
            hub,
            lambda episode: played(hub.version, reward=rewards(episode.group, episode.id)),
            seconds=lambda episode: seconds(episode.group),
        )
        async with RolloutLoop(
            hub, crew=crew, tasks=map(Task, range(tasks)), batch_size=8, group_size=2, alpha=alpha,
            settings=RolloutSettings(reuse=ReuseConfig(**(reuse or ON)), on_stale=on_stale),
            restored=restored or Restored(), last_version=last_version,
        ) as loop:  # fmt: skip
            yield loop


def groups(batch: Batch) -> list[int]:
    """In their order."""
    return list(dict.fromkeys(sample.group for sample in batch.samples))


async def train(loop: RolloutLoop, steps: int, *, take_s: float = 0.0) -> list[Batch]:
    batches = []
    for _ in range(steps):
        batches.append(await loop.next_batch())
        await asyncio.sleep(take_s)
        await loop.publish(weights(batches[-1].version + 1))
    return batches


# ── which groups make a batch ────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_without_the_setting_nothing_is_trained_twice():
    async with rollouts(of_groups({}, 7.0), reuse={"uses": 1}) as loop:
        batches = await train(loop, 20)
    trained = [group for batch in batches for group in groups(batch)]
    assert len(trained) == len(set(trained)) == 80
    assert loop.ledger.metrics()["episodes/reused"] == 0
    assert not any(name.startswith("reuse/") for batch in batches for name in batch.metrics)


@in_virtual_time
async def test_where_a_batch_would_wait_the_newest_trained_groups_fill_it_after_the_fresh_ones():
    async with rollouts(of_groups({0: 1, 1: 1, 2: 1, 3: 1, 4: 5, 5: 5}, NEVER_S)) as loop:
        first, second = await train(loop, 2)
        assert groups(first) == [0, 1, 2, 3], "nothing was trained before it"
        assert groups(second) == [4, 5, 3, 2]
        assert asyncio.get_running_loop().time() == pytest.approx(5, abs=2)
        assert Counter(sample.group for sample in second.samples) == dict.fromkeys(
            groups(second), 2
        )
        assert (first.metrics["reuse/share"], second.metrics["reuse/share"]) == (0, 0.5)
        assert second.metrics["reuse/age_mean"] == 1
        assert second.metrics["staleness/histogram"] == [8, 8], "tokens of both"


@in_virtual_time
async def test_what_is_complete_is_trained_before_anything_again():
    async with rollouts() as loop:
        for batch in await train(loop, 10, take_s=5):
            assert batch.metrics["reuse/share"] == 0


@in_virtual_time
async def test_a_batch_waits_for_its_least_fresh_groups_and_for_all_that_nothing_can_replace():
    times = {0: 1, 1: 1, 2: 1, 3: 1, 4: 5, 5: 20, 6: 30, 7: 40}
    async with rollouts(of_groups(times, NEVER_S), reuse={"uses": 2, "share": 0.25}) as loop:
        await train(loop, 1)
        assert groups(await loop.next_batch()) == [4, 5, 6, 3], "one of four is a quarter"
        assert asyncio.get_running_loop().time() == 30


@in_virtual_time
async def test_advantages_and_what_the_engine_said_are_the_same_again():
    async with rollouts(of_groups({0: 1, 1: 1, 2: 1, 3: 1, 4: 5, 5: 5}, NEVER_S)) as loop:
        first, second = await train(loop, 2)
    before = {sample.episode: sample for sample in first.samples}
    again = [sample for sample in second.samples if sample.episode in before]
    assert len(again) == 4
    for sample in again:
        assert sample.advantage == before[sample.episode].advantage != 0
        assert sample.logprobs.tolist() == before[sample.episode].logprobs.tolist()
        assert sample.versions.tolist() == before[sample.episode].versions.tolist()


@in_virtual_time
async def test_numbers_of_episodes_are_of_those_that_are_new():
    times = {0: 1, 1: 1, 2: 1, 3: 1, 4: 5, 5: 5}
    rewards = lambda group, number: float(group < 4)  # noqa: E731
    async with rollouts(of_groups(times, NEVER_S), rewards=rewards) as loop:
        first, second = await train(loop, 2)
    assert (first.metrics["reward/mean"], second.metrics["reward/mean"]) == (1, 0)


@pytest.mark.parametrize(("uses_", "alpha"), [(2, 4), (3, 2)])
@in_virtual_time
async def test_no_group_is_trained_more_often_than_allowed_or_with_a_token_past_alpha(uses_, alpha):
    reuse = {"uses": uses_, "share": 0.75}
    async with rollouts(of_groups({}, 5.0), reuse=reuse, alpha=alpha) as loop:
        batches = await train(loop, 40)
        uses = Counter(group for batch in batches for group in groups(batch))
        assert max(uses.values()) == uses_
        assert max(batch.metrics["staleness/max"] for batch in batches) <= alpha
        shares = [batch.metrics["reuse/share"] for batch in batches]
        assert max(shares) == 0.75
        assert loop.ledger.reused == 2 * (sum(uses.values()) - len(uses))
        assert loop.ledger.count("trained") == 2 * len(uses)


@in_virtual_time
async def test_as_much_is_under_way_as_batches_take_of_fresh_groups_and_as_the_next_one_lacks():
    async with rollouts(of_groups({0: 1, 1: 1, 2: 1, 3: 1}, NEVER_S)) as loop:
        assert loop.ledger.running == 2 * (3 * 2 + 2), "no group can be trained again yet"
        await loop.next_batch()
        assert loop.ledger.running == 2 * (3 * 2 - 2), "the batch has the slots of its least"
        await loop.publish(weights(1))
        assert loop.ledger.running == 2 * 3 * 2


@pytest.mark.parametrize(
    ("alpha", "reuse", "said"),
    [
        (
            0,
            ON,
            "rollout.reuse.uses=2 with alpha=0: no token is within alpha for more than 1 batch",
        ),
        (1, {"uses": 3}, "set alpha to 2 or more, or uses to 2"),
        (1, {"uses": 2, "share": 0.2}, "share=0.2 of the 4 groups in a batch is none"),
    ],
)
@in_virtual_time
async def test_a_reuse_that_could_never_be_is_refused(alpha, reuse, said):
    with pytest.raises(ValueError, match=said):
        async with rollouts(alpha=alpha, reuse=reuse):
            pass


@in_virtual_time
async def test_the_last_tasks_are_enough_where_trained_groups_fill_the_batch():
    async with rollouts(tasks=6) as loop:
        batches = await train(loop, 2)
        assert groups(batches[1]) == [4, 5, 3, 2]
        with pytest.raises(RolloutFailure, match="0 groups left, and a batch takes 2"):
            await loop.next_batch()


# ── priorities ───────────────────────────────────────────────────────────────────────────────


def told(version: int, *rewards: float, age: int = 0, uses: int = 1) -> TrainedGroup:
    return TrainedGroup(
        trajectories=[played(version, reward) for reward in rewards or (0.0, 1.0)],
        version=version,
        age=age,
        uses=uses,
    )


def test_linear_decay_is_the_version_less_two_for_each_use():
    priority = find_priority(ReuseConfig().priority)
    assert priority(told(7, uses=1)) == 5
    assert priority(told(7, uses=3)) == 1
    other = find_priority(ReuseConfig(priority={"decay": 0.5}).priority)
    assert other(told(7, uses=1)) == 6.5


def test_age_decay_is_the_deviation_of_rewards_and_falls_with_age():
    priority = find_priority(ReuseConfig(priority={"name": "age_decay", "tau": 2.0}).priority)
    assert priority(told(0, 0.0, 1.0)) == pytest.approx(0.5)
    assert priority(told(0, 1.0, 1.0)) == 0
    assert priority(told(0, 0.0, 1.0, age=2)) == pytest.approx(0.5 / 2.718281828)


@in_virtual_time
async def test_the_highest_priority_is_trained_again_first():
    times = of_groups({0: 1, 1: 1, 2: 1, 3: 1, 4: 5, 5: 5}, NEVER_S)
    unequal = lambda group, number: float(number % 2) if group in (0, 2) else 1.0  # noqa: E731
    reuse = {**ON, "priority": "age_decay"}
    async with rollouts(times, reuse=reuse, rewards=unequal) as loop:
        assert groups((await train(loop, 2))[1]) == [4, 5, 2, 0]


def oldest_first(group: TrainedGroup) -> float:
    return -group.trajectories[0].reward


def no_number(group: TrainedGroup) -> str:
    return "high"


def broken(group: TrainedGroup) -> float:
    return 1 / 0


@in_virtual_time
async def test_a_priority_of_ones_own_decides():
    times = of_groups({0: 1, 1: 1, 2: 1, 3: 1, 4: 5, 5: 5}, NEVER_S)
    reuse = {**ON, "priority": {"name": "function", "run": f"{__name__}:oldest_first"}}
    async with rollouts(times, reuse=reuse, rewards=lambda group, number: group) as loop:
        assert groups((await train(loop, 2))[1]) == [4, 5, 0, 1]


@pytest.mark.parametrize(
    ("name", "said"), [("no_number", "returned 'high': return a number"), ("broken", "raised Zero")]
)
@in_virtual_time
async def test_a_priority_that_fails_ends_the_run_by_its_name(name, said):
    times = of_groups({0: 1, 1: 1, 2: 1, 3: 1, 4: 5, 5: 5}, NEVER_S)
    reuse = {**ON, "priority": {"name": "function", "run": f"{__name__}:{name}"}}
    async with rollouts(times, reuse=reuse) as loop:
        with pytest.raises(RolloutFailure, match=rf"rollout.reuse.priority: \S+:{name} {said}"):
            await train(loop, 2)


# ── the other ways to take batches ───────────────────────────────────────────────────────────


@in_virtual_time
async def test_streamed_the_trained_groups_fill_the_last_part():
    times = {0: 1, 1: 1, 2: 1, 3: 1, 4: 5, 5: 20, 6: 30}
    async with rollouts(of_groups(times, NEVER_S)) as loop:
        await train(loop, 1)
        parts = [await loop.next_part() for _ in range(2)]
        assert [(groups(part), part.last) for part in parts] == [([4], False), ([5, 3, 2], True)]
        assert parts[1].metrics["reuse/share"] == 0.5
        assert parts[1].metrics["staleness/histogram"] == [8, 8], "of the whole batch"


@in_virtual_time
async def test_streamed_a_part_of_nothing_new_is_the_last():
    times = {0: 1, 1: 1, 2: 1, 3: 1, 4: 5, 5: 5, 6: 5}
    async with rollouts(of_groups(times, NEVER_S), reuse={"uses": 2, "share": 0.25}) as loop:
        await train(loop, 1)
        await asyncio.sleep(10)
        assert [groups(await loop.next_part()), loop.ledger.reused] == [[4, 5, 6, 3], 2]


@in_virtual_time
async def test_what_is_waited_for_keeps_its_place():
    """Group 4 must be in the batch of version 1, or it grows too old; the fresh ones would do."""
    version_zero = {4}
    times = {0: 1, 1: 1, 2: 1, 3: 1, 4: 100, 5: 5, 6: 5}
    async with rollouts(of_groups(times, NEVER_S), alpha=1, on_stale="wait") as loop:
        await train(loop, 1)
        for episode in loop.episodes():
            episode.oldest = 0 if episode.group in version_zero else 1
        batch = await loop.next_batch()
        assert asyncio.get_running_loop().time() == 100
        assert groups(batch) == [4, 5, 6, 3]


# ── books ────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_the_ledger_objects_to_a_use_too_many():
    async with InferenceHub([FakeWorker("w")]) as hub:
        ledger, episode = Ledger(most_uses=2), Episode(1, Task(1), hub=hub)
        ledger.trained_again(episode, 2)
        assert ledger.reused == 1
        with pytest.raises(AssertionError, match="is trained 3 times"):
            ledger.trained_again(episode, 3)


@in_virtual_time
async def test_what_is_kept_is_bounded_by_alpha():
    async with InferenceHub([FakeWorker("w")]) as hub:
        reuse = Reuse(ReuseConfig(uses=3), alpha=2, groups_per_batch=4)
        for version in range(50):
            batch = [Group(10 * version + number, Task(0), 1) for number in range(4)]
            for group in batch:
                group.members[0] = Episode(group.id, Task(0), hub=hub)
                group.members[0].finish(played(version))
            reuse.trained(batch, version=version)
            assert len(reuse) <= 3 * 4
        assert len(reuse.choose(2, version=50)) == 2
        assert reuse.choose(2, version=60) == [], "all are too old for a later batch"


@in_virtual_time
async def test_only_what_is_kept_and_fresh_is_available_each_group_once():
    reuse = Reuse(ReuseConfig(uses=2, share=0.9), alpha=2, groups_per_batch=4)
    async with InferenceHub([FakeWorker("w")]) as hub:

        def group(number, version):
            made = Group(number, Task(0), 1)
            made.members[0] = Episode(number, Task(0), hub=hub)
            made.members[0].finish(played(version))
            return made

        old, new = group(0, version=0), group(1, version=1)
        reuse.trained([old], version=1)
        reuse.trained([new], version=1)
        assert [reuse.available(version) for version in (2, 3, 4)] == [2, 1, 0]
        reuse.keep(new, uses=1)
        assert reuse.available(3) == 1, "the same one"
        reuse.trained([new], version=2)  # for the last time; the old one would be too old
        assert (reuse.available(3), len(reuse)) == (0, 0)


def test_no_slots_are_held_by_what_is_trained_again():
    slots = Slots(
        groups_per_batch=4, reused_groups=2, group_size=2, alpha=1, redundant_groups=0,
        redundant_episodes=0, last_version=None,
    )  # fmt: skip
    assert slots.limit == slots.capacity == 2 * (2 * 2 + 2)
    slots.expect(2)
    assert slots.limit == 2 * 2 * 2
    slots.hold(0)
    assert slots.held == 2 * 2
    slots.expect(1)
    assert slots.limit == 2 * (2 * 2 + 1)


def test_no_room_is_left_to_half_a_group_where_trained_ones_can_fill_a_batch():
    """It could not come to its end before a publish, and under `wait` the batch would be kept
    for it."""
    sizes = {"groups_per_batch": 4, "group_size": 4, "alpha": 2.5, "last_version": None}
    none = {"redundant_groups": 0, "redundant_episodes": 0}
    slots = Slots(reused_groups=3, **sizes, **none)
    slots.expect(3)
    assert slots.limit == 4 * 3


def used(group: int, *, uses: int, version: int = 0) -> UsedGroup:
    episodes = [
        ReadyEpisode(
            episode=2 * group + number,
            attempt=1,
            trajectory=played(version, float(number)),
            prompt_tokens=2,
            generated_tokens=2,
        )
        for number in range(2)
    ]
    return UsedGroup(group=group, task=Task(group), episodes=episodes, uses=uses)


@in_virtual_time
async def test_a_loop_that_goes_on_has_what_may_be_trained_again_and_counts_its_uses():
    restored = Restored(
        reusable=[used(3, uses=1), used(4, uses=1), used(5, uses=2)], first_ids=(100, 50)
    )
    times = {50: 1, 51: 1, 52: 2, 53: 2, 54: 2}
    reuse = {"uses": 3, "share": 0.5}
    async with rollouts(of_groups(times, NEVER_S), reuse=reuse, restored=restored) as loop:
        first, second = await train(loop, 2)
        assert groups(first) == [50, 51, 4, 3]
        assert [sample.episode for sample in first.samples[4:]] == [8, 9, 6, 7]
        assert loop.ledger.reused == 4 + 2
        assert groups(second) == [52, 53, 54, 51], "version 0 as well, and used least"


# ── what it saves ────────────────────────────────────────────────────────────────────────────


def test_a_simulated_run_that_waits_for_rollout_samples_less_for_as_many_steps():
    def simulated(uses: int) -> Any:
        return simulate(
            Scenario(
                steps=20, batch_size=32, group_size=4, alpha=2,
                rollout={"reuse": {"uses": uses}},
                workers={"count": 1, "max_running": 16},
                trainer={"batch_s": 1.0},
                workload={"response_tokens": {"kind": "lognormal", "mean": 512, "sigma": 0.7}},
            )
        )  # fmt: skip

    without, with_it = simulated(1), simulated(2)
    assert (len(without.steps), without.trained) == (20, 20 * 32)
    assert len(with_it.steps) == 20
    assert with_it.trained < 0.8 * without.trained
    assert with_it.time_s < without.time_s
    assert with_it.staleness_max <= 2


@pytest.mark.slow
async def test_a_run_whose_rollout_is_slow_trains_episodes_again_as_its_log_says(tmp_path):
    changes = {
        "env.name": f"{SlowLake.__module__}:{SlowLake.__name__}",
        "env.hosts": 1,  # or it would hold up the trainer's answers as well
        "steps": 4,
        "alpha": 2,
        "eval_every": 0,
        "rollout.reuse.uses": 2,
    }
    summary = await run(tiny("frozen_lake", tmp_path, **changes))
    folder = Path(summary["folder"])
    last = read_lines(folder / "metrics.jsonl")[-1]
    with contextlib.closing(sqlite3.connect(folder / "log.sqlite")) as log:
        uses = "SELECT episode, count(DISTINCT version) FROM samples GROUP BY episode"
        used = dict(log.execute(uses).fetchall())
    assert max(used.values()) == 2
    assert last["episodes/trained"] == len(used) < 4 * 16
    assert last["episodes/trained"] + last["episodes/reused"] == sum(used.values()) == 4 * 16
    assert summary["staleness_max"] <= 2
    assert summary["outcomes"]["trained"] == len(used)
