"""Scheduling, replication, redundancy and filters, one promise at a time, under virtual time."""

import asyncio
import contextlib
import math
import random
from collections import Counter, defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash import virtual_time
from flash.agents import Actor, EnvironmentAgent
from flash.conversation import TokenSequence
from flash.errors import EnvFailure, RolloutFailure
from flash.fakes import FakeEnvs, FakeStyle, FakeWorker, KeepingObserver
from flash.hub.hub import InferenceHub
from flash.rollout.bias import LengthBias, mean_with_cut_off
from flash.rollout.filters import equal_rewards, find_filter
from flash.rollout.loop import RolloutLoop
from flash.simulate import Scenario, simulate
from flash.trainer.advantage_settings import TurnReturns
from flash.trainer.advantages import make_advantages
from flash.types import GenerateRequest, SamplingParams, Task, Trajectory
from flash.virtual_time import in_virtual_time
from tests.loops import loop_options
from tests.steady import now, weights

SAMPLING = SamplingParams(max_tokens=4)


class Player(Actor):
    """Samples a few tokens, then takes the seconds that its task and number in the group say."""

    def __init__(
        self, seconds, rewards=lambda task, number: number, failing=lambda *_: False, lingers_s=0
    ):
        super().__init__(episode_timeout_s=1e6)
        self._told = seconds, rewards, failing
        self._lingers_s = lingers_s  # when it is given up

    async def play(self, episode):
        seconds, rewards, failing = self._told
        tokens = TokenSequence([1, 2])
        tokens.add_sampled(await episode.generate([1, 2], SAMPLING))
        number = self.numbers[episode.group]
        self.numbers[episode.group] += 1
        try:
            await asyncio.sleep(seconds(episode.group, number))
        except asyncio.CancelledError:
            await asyncio.sleep(self._lingers_s)
            raise
        if failing(episode.group, number):
            raise EnvFailure("planned")
        reward = rewards(episode.group, number)
        return Trajectory(sequences=[tokens.snapshot()], reward=reward, turns=1)


@contextlib.asynccontextmanager
async def rollouts(seconds=lambda *_: 1.0, records=None, workers=None, **options):
    numbers = defaultdict(int)
    told = {
        name: options.pop(name) for name in ("rewards", "failing", "lingers_s") if name in options
    }

    def make_agent():
        agent = Player(seconds, **told)
        agent.numbers = numbers
        return agent

    options = {"batch_size": 4, "group_size": 2, "alpha": 1, **options}
    async with (
        InferenceHub(workers or [FakeWorker("w")]) as hub,
        RolloutLoop(
            hub, agent=make_agent, tasks=(Task(i) for i in range(10**6)),
            observers=[KeepingObserver(records)], **loop_options(**options),
        ) as loop,
    ):  # fmt: skip
        yield loop


def outcomes(records):
    return Counter((r.outcome, r.reason) for r in records if r.reason != "shutdown")


# ── scheduling and replication ───────────────────────────────────────────────────────────────


def test_under_a_batch_schedule_the_next_batch_begins_when_the_last_episode_has_ended():
    async def main(schedule):
        records = []
        slow = lambda group, number: 50.0 if (group, number) == (1, 1) else 1.0  # noqa: E731
        async with rollouts(slow, records, schedule=schedule) as loop:
            for version in (1, 2, 3):
                await loop.next_batch()
                await loop.publish(weights(version))
        return sorted({round(r.admitted_s) for r in records}), records

    admitted, records = virtual_time.run(main("batch"))
    assert len([r for r in records if r.admitted_s == 0]) == 4, "one batch, though α allows two"
    assert admitted[1] >= 50
    admitted, records = virtual_time.run(main("queue"))
    assert len([r for r in records if r.admitted_s == 0]) == 8
    assert 0 < admitted[1] < 10


@in_virtual_time
async def test_batches_that_filters_thin_are_filled_up_by_a_batch_of_their_own():
    records = []
    options = {"schedule": "batch", "filters": [equal_rewards], "alpha": 0}
    rewards = lambda group, number: number * (group not in (0, 3))  # noqa: E731
    takes = lambda group, number: 10.0 if group == 1 else 1.0  # noqa: E731
    async with rollouts(takes, records, rewards=rewards, **options) as loop:
        batch = await loop.next_batch()
    assert {sample.group for sample in batch.samples} == {1, 2}
    began = {r.group: r.admitted_s for r in records}
    assert began[2] >= 10, "not before the first batch's last episode has ended"


def test_without_replication_a_groups_first_responses_come_from_one_worker():
    async def main(replicate):
        workers = [FakeWorker("a"), FakeWorker("b")]
        async with rollouts(workers=workers, replicate=replicate, alpha=0, group_size=4) as loop:
            await loop.next_batch()
        return sorted(len(worker.started) for worker in workers)

    assert virtual_time.run(main(True)) == [2, 2]
    assert virtual_time.run(main(False)) == [0, 4]


@in_virtual_time
async def test_who_must_wait_for_one_worker_holds_up_nobody_who_need_not():
    workers = [FakeWorker(name, tokens=(4, 4), token_s=(1.0, 1.0)) for name in "ab"]
    async with InferenceHub(workers, max_running=1) as hub, asyncio.TaskGroup() as tasks:
        ask = lambda pin: tasks.create_task(  # noqa: E731
            hub.generate(GenerateRequest(token_ids=[1], sampling=SAMPLING, pin=pin))
        )
        together = [ask("here") for _ in range(3)]
        alone = ask("")
        assert (await alone).worker != (await together[0]).worker
        assert now() == pytest.approx(4)
        assert {(await one).worker for one in together} == {(await together[0]).worker}
        assert now() == pytest.approx(12)


@in_virtual_time
async def test_a_pin_whose_worker_fails_moves_to_another():
    workers = [FakeWorker(name) for name in "ab"]
    async with InferenceHub(workers) as hub:
        request = GenerateRequest(token_ids=[1], sampling=SAMPLING, pin="here")
        home = (await hub.generate(request)).worker
        next(worker for worker in workers if worker.name == home).die()
        assert (await hub.generate(request)).worker != home


# ── redundancy ───────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_redundant_episodes_that_are_slowest_are_cancelled_at_once():
    records = []
    takes = lambda group, number: 1.0 if number < 2 else 99.0  # noqa: E731
    async with rollouts(takes, records, redundant_episodes=1, alpha=0) as loop:
        assert loop.ledger.running == 6
        batch = await loop.next_batch()
        assert Counter(sample.group for sample in batch.samples) == {0: 2, 1: 2}
        await asyncio.sleep(0.01)
        assert loop.ledger.running == 0
        assert now() < 2
    assert outcomes(records) == {("trained", ""): 4, ("cancelled", "redundant"): 2}


@in_virtual_time
async def test_redundant_groups_that_are_slowest_are_cancelled_at_once():
    records = []
    takes = lambda group, number: 99.0 if group == 0 else 1.0  # noqa: E731
    async with rollouts(takes, records, redundant_groups=1, alpha=0) as loop:
        assert loop.ledger.running == 6
        batch = await loop.next_batch()
        assert {sample.group for sample in batch.samples} == {1, 2}
        await asyncio.sleep(0.01)
        assert loop.ledger.running == 0
        assert now() < 2
        await loop.publish(weights(1))
        assert {episode.group for episode in loop.episodes()} == {3, 4, 5}
    assert outcomes(records) == {("trained", ""): 4, ("cancelled", "redundant"): 2}


@in_virtual_time
async def test_redundancy_does_not_make_rollout_run_further_ahead():
    async with rollouts(redundant_groups=3, redundant_episodes=2, alpha=1) as loop:
        assert loop.ledger.running == (4 + 3) * 4
        await asyncio.sleep(1000)
        assert (loop.ledger.running, loop.ledger.ready) == (0, 8), "two batches, as α says"
        await loop.next_batch()
        await asyncio.sleep(1000)
        assert (loop.ledger.running, loop.ledger.ready) == (0, 4)


@in_virtual_time
async def test_spares_in_the_place_of_some_that_linger_take_no_slots_of_an_unpublished_batch():
    takes = lambda group, number: 1.0 if group < 2 else 99.0  # noqa: E731
    async with rollouts(takes, redundant_episodes=1, lingers_s=20) as loop:
        batch = await loop.next_batch()
        await asyncio.sleep(30)
        for _ in range(4):
            loop.replace(next(e for e in loop.episodes() if e.cancel_reason is None))
            loop.use_alpha(1)  # begins what there is room for
            assert loop.ledger.running + len(batch.samples) <= loop.capacity
        assert loop.ledger.running == 8
        await asyncio.sleep(30)
        assert loop.ledger.running == 6, "those that lingered were replaced"


def test_a_group_outlives_an_episode_that_keeps_failing_if_it_has_a_spare():
    async def main(redundant_episodes):
        records = []
        failing = lambda group, number: (group, number) == (0, 0)  # noqa: E731
        async with rollouts(
            lambda group, number: 1.0 + number, records, failing=failing, max_attempts=1,
            redundant_episodes=redundant_episodes, alpha=0,
        ) as loop:  # fmt: skip
            batch = await loop.next_batch()
        return {sample.group for sample in batch.samples}

    assert virtual_time.run(main(0)) == {1, 2}
    assert virtual_time.run(main(1)) == {0, 1}


@pytest.mark.parametrize("field", ["redundant_groups", "redundant_episodes", "max_regenerations"])
def test_negative_counts_are_refused_by_name(field):
    async def main():
        async with rollouts(**{field: -1}):
            pass

    with pytest.raises(ValueError, match=rf"{field}\s+Input should be greater than or equal to 0"):
        virtual_time.run(main())


# ── what can no longer matter ────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_nothing_is_begun_that_no_batch_can_take_before_training_ends():
    records = []
    async with rollouts(records=records, alpha=3, last_version=2) as loop:
        assert loop.ledger.running == 8
        for version in (1, 2):
            await loop.next_batch()
            await loop.publish(weights(version))
        assert loop.ledger.running == 0
    assert outcomes(records) == {("trained", ""): 8}


# ── filters ──────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_a_group_that_is_filtered_is_replaced_by_another_task():
    records = []
    rewards = lambda group, number: number * (group % 2)  # noqa: E731
    async with rollouts(records=records, filters=[equal_rewards], rewards=rewards) as loop:
        for version in (1, 2, 3):
            batch = await loop.next_batch()
            assert all(sample.group % 2 for sample in batch.samples)
            await loop.publish(weights(version))
    assert outcomes(records)["dropped", "filtered:equal_rewards"] >= 12


def test_rewards_are_equal_but_for_rounding():
    def group(*rewards):
        return [Trajectory(sequences=[], reward=reward, turns=1) for reward in rewards]

    for rewards in ((0.1 + 0.2, 0.3), (1e9 + 1e-6, 1e9), (0.0, -1e-12), (-0.7, -0.7), (2,)):
        assert equal_rewards(group(*rewards)), rewards
    for rewards in ((0.3, 0.3001), (0.0, 1e-6), (1.0, -1.0), (1e9, 1e9 + 1e4)):
        assert not equal_rewards(group(*rewards)), rewards


def test_filters_that_drop_everything_end_the_run_with_numbers_and_remedy():
    async def main():
        async with rollouts(
            filters=[equal_rewards], rewards=lambda *_: 1.0, max_filtered=3
        ) as loop:
            await loop.next_batch()

    message = r"dropped 7 groups and kept 0 .* by equal_rewards; rollout.max_filtered allows 6"
    with pytest.raises(RolloutFailure, match=message):
        virtual_time.run(main())


def test_a_filter_that_raises_ends_the_run_by_its_name():
    def picky(group):
        raise KeyError("no such thing")

    async def main():
        async with rollouts(filters=[picky]) as loop:
            await loop.next_batch()

    with pytest.raises(RolloutFailure, match="picky raised KeyError"):
        virtual_time.run(main())


@pytest.mark.parametrize("answer", [None, 1, "drop", np.array([True, False])])
def test_a_filter_that_answers_neither_true_nor_false_ends_the_run_by_its_name(answer):
    def picky(group):
        return answer

    async def main():
        async with rollouts(filters=[picky]) as loop:
            await loop.next_batch()

    with pytest.raises(RolloutFailure, match=r"rollout\.filters: picky returned .*: return True f"):
        virtual_time.run(main())


def test_a_filter_gets_a_whole_group_and_may_answer_as_numpy_does():
    seen = []

    def picky(group):
        seen.append([(type(one), one.reward) for one in group])
        return np.std([one.reward for one in group]) > 10

    async def main():
        async with rollouts(filters=[picky]) as loop:
            await loop.next_batch()

    virtual_time.run(main())
    assert seen
    assert all([kind for kind, _ in group] == [Trajectory] * len(seen[0]) for group in seen)


def test_a_filter_is_no_coroutine_function():
    with pytest.raises(ValueError, match=r"'asyncio:wait' is a coroutine function, .*: write def"):
        find_filter("asyncio:wait")


def test_a_filter_is_found_by_its_name_or_as_a_function_of_ones_own():
    assert find_filter("equal_rewards") is equal_rewards
    assert find_filter("flash.rollout.filters:equal_rewards") is equal_rewards
    with pytest.raises(ValueError, match=r"rollout.filters: 'equal' is not one of equal_rewards"):
        find_filter("equal")
    with pytest.raises(ValueError, match=r"rollout.filters='json:nothing' can't be imported"):
        find_filter("json:nothing")


# ── fairness ─────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_a_task_too_slow_for_alpha_is_given_up_after_so_many_regenerations():
    records = []
    takes = lambda group, number: 1e4 if group == 0 else 1.0  # noqa: E731
    async with rollouts(takes, records, max_regenerations=2) as loop:
        for version in range(1, 12):
            await loop.next_batch()
            await asyncio.sleep(1)
            await loop.publish(weights(version))
    of_the_slow = outcomes([record for record in records if record.group == 0])
    assert of_the_slow == {("cancelled", "stale"): 4, ("cancelled", "too_slow"): 2}


def test_the_mean_length_counts_what_was_cut_off_as_longer():
    whole, cut_off = lengths(1, 100), lengths(10)
    # Two of three are left after 1; one of those is known to be longer than 10: 1/3·1 + 2/3·100.
    assert mean_with_cut_off(whole, cut_off) == pytest.approx(67, rel=0.03)
    assert mean_with_cut_off(lengths(1, 1, 4), Counter()) == pytest.approx(2, rel=0.03)
    assert mean_with_cut_off(lengths(1), lengths(50)) == pytest.approx(25.5, rel=0.03)


def lengths(*values):
    return Counter(round(math.log(v) / math.log(1.05)) if v >= 1 else -1 for v in values)


episode_so_far = st.builds(
    SimpleNamespace,
    turns=st.integers(0, 50),
    generated_tokens=st.integers(0, 10**6),
    admitted_at=st.floats(0, 1000),
)


@given(st.lists(episode_so_far, max_size=20))
def test_what_runs_still_is_cut_off_where_it_is(running):
    clock = lambda: 1000.0  # noqa: E731
    bias = LengthBias()
    whole = SimpleNamespace(
        id=-1, trajectory=object(), turns=10, generated_tokens=10, stage_since=10.0, admitted_at=0.0
    )
    for number, episode in enumerate([whole, *running]):
        vars(episode).update(id=number, clock=clock)
        bias.admitted(episode)
    bias.played(whole)
    bias.ended(whole, SimpleNamespace(outcome="trained"))
    so_far = {
        "turns": (10, [episode.turns for episode in running]),
        "tokens": (10, [episode.generated_tokens for episode in running]),
        "seconds": (10_000, [1000 * (1000 - episode.admitted_at) for episode in running]),
    }
    for name, (of_whole, cut_off) in so_far.items():
        admitted = mean_with_cut_off(lengths(of_whole), lengths(*cut_off))
        trained = mean_with_cut_off(lengths(of_whole), Counter())
        assert bias.metrics()[f"bias/{name}"] == pytest.approx(trained / admitted)


def test_the_bias_toward_quick_episodes_is_told_and_warned_of(caplog):
    async def main(**options):
        rng = random.Random(0)
        takes = lambda *_: rng.lognormvariate(0, 1.5)  # noqa: E731
        async with rollouts(takes, batch_size=16, **options) as loop:
            for version in range(1, 30):
                batch = await loop.next_batch()
                await loop.publish(weights(version))
        return batch.metrics

    metrics = virtual_time.run(main(on_stale="wait", alpha=1))
    assert 0.9 < metrics["bias/seconds"] < 1.1
    assert not caplog.messages
    metrics = virtual_time.run(main(redundant_episodes=2, alpha=0))
    assert metrics["bias/seconds"] < 0.7
    assert metrics["bias/turns"] == pytest.approx(1)
    assert sum("slow episodes are starved" in message for message in caplog.messages) == 1


# ── publishing now and then ──────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_alpha_counts_versions_trained_where_only_some_are_published():
    async with rollouts(alpha=2) as loop:
        ages = []
        for version in range(1, 10):
            batch = await loop.next_batch()
            ages.append(batch.metrics["staleness/max"])
            assert batch.version == version - 1
            if version % 3 == 0:
                await loop.publish(weights(version))
    assert ages == [0, 1, 2] * 3


@in_virtual_time
async def test_the_next_batch_is_assembled_while_weights_are_published():
    worker = FakeWorker("w", load_s=(50, 50))
    async with rollouts(workers=[worker], alpha=1) as loop:
        await loop.next_batch()
        before = loop.ledger.ready
        publishing = asyncio.create_task(loop.publish(weights(1)))
        await asyncio.sleep(40)
        assert not publishing.done()
        assert loop.ledger.ready >= before
        assert loop.ledger.ready == 4, "a whole batch, ready before the publish is over"
        await publishing


def test_trinitys_sync_interval_and_offset_are_publish_every_and_alpha():
    def run(sync_interval, sync_offset):
        scenario = Scenario(
            steps=12, alpha=sync_interval - 1 + sync_offset, publish_every=sync_interval,
            batch_size=16, group_size=4, workload={"response_tokens": 100},
            trainer={"batch_s": 1.0}, workers={"max_running": 16},
        )  # fmt: skip
        return simulate(scenario)

    in_step, ahead = run(3, 0), run(3, 2)
    assert in_step.staleness_max == 2
    assert in_step.staleness_mean == pytest.approx(1)
    assert ahead.staleness_max <= 4
    assert ahead.time_s < in_step.time_s, "rollout goes on while the trainer trains"


# ── a batch in parts ─────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_a_batch_comes_in_parts_as_groups_finish_and_is_the_whole_one_in_the_end():
    records = []
    takes = lambda group, number: [3.0, 1.0, 2.0, 1.0][group % 4]  # noqa: E731
    rewards = lambda group, number: float(number)  # noqa: E731
    async with rollouts(takes, records, rewards=rewards, batch_size=8, alpha=0) as loop:
        first = await loop.next_part()
        assert (first.last, first.version) == (False, 0)
        assert sorted(Counter(s.group for s in first.samples).items()) == [(1, 2), (3, 2)]
        assert sorted(sample.advantage for sample in first.samples) == [-1, -1, 1, 1]
        assert loop.ledger.count("trained") == 0, "the batch is not whole"
        with pytest.raises(ValueError, match="begun with next_part"):
            await loop.next_batch()
        second = await loop.next_part()
        assert not second.last
        last = await loop.next_part()
        assert last.last
        assert (second.samples[0].group, last.samples[0].group) == (2, 0)
        assert now() == pytest.approx(3, abs=0.5)
        assert loop.ledger.count("trained") == 8
        assert last.metrics["reward/mean"] == 0.5
        await loop.publish(weights(1))
        assert (await loop.next_part()).version == 1


@in_virtual_time
async def test_a_batch_that_was_begun_in_parts_and_never_completed_was_not_trained():
    records = []
    takes = lambda group, number: 1.0 + 99 * group  # noqa: E731
    async with rollouts(takes, records) as loop:
        assert not (await loop.next_part()).last
    assert {(r.outcome, r.reason) for r in records if r.group == 0} == {("dropped", "shutdown")}


@in_virtual_time
async def test_a_group_that_must_not_wait_longer_has_its_place_in_a_batch_of_parts():
    takes = lambda group, number: 30.0 if group == 0 else 1.0  # noqa: E731
    async with rollouts(takes, on_stale="wait", alpha=1) as loop:
        seen = []
        for version in (1, 2, 3):
            last = False
            while not last:
                part = await loop.next_part()
                last = part.last
                seen += [(part.version, sample.group) for sample in part.samples]
            await loop.publish(weights(version))
    assert (1, 0) in seen, "the oldest group waited for, in the last batch it is fresh for"


def test_streaming_shortens_a_synchronous_step():
    scenario = Scenario(
        steps=4, alpha=0, batch_size=32, group_size=4, workers={"max_running": 32},
        workload={"response_tokens": {"kind": "lognormal", "mean": 500, "sigma": 1.0}},
        trainer={"token_gpu_s": 1e-3, "batch_s": 0.1},
    )  # fmt: skip
    whole, parts = simulate(scenario), simulate(scenario.changed({"stream": True}))
    assert parts.time_s < 0.8 * whole.time_s
    assert parts.staleness_max == 0
    assert [step.tokens for step in parts.steps] == [step.tokens for step in whole.steps]


# ── a sample for each turn ───────────────────────────────────────────────────────────────────


def test_an_episode_can_be_trained_as_a_sample_for_each_turn():
    async def main(samples):
        envs, style = FakeEnvs(turns=(1, 4)), FakeStyle()
        make_agent = lambda: EnvironmentAgent(  # noqa: E731
            envs=envs, style=style, max_tokens=4, samples=samples
        )
        advantages = make_advantages(TurnReturns(gamma=0.5))
        async with (
            InferenceHub([FakeWorker("w", seed=3)]) as hub,
            RolloutLoop(
                hub, agent=make_agent, tasks=[Task(0), Task(1)], batch_size=8, group_size=4,
                alpha=0, advantages=advantages,
            ) as loop,
        ):  # fmt: skip
            return await loop.next_batch()

    whole, turns = virtual_time.run(main("whole")), virtual_time.run(main("turns"))
    assert len(whole.samples) == 8 < len(turns.samples)
    of_episode = defaultdict(list)
    for sample in turns.samples:
        of_episode[sample.episode].append(sample)
    for sample in whole.samples:
        parts = of_episode[sample.episode]
        assert len(parts) == sample.turns.max() + 1
        for number, part in enumerate(parts):
            its = sample.turns == number
            assert part.token_ids.tolist() == sample.token_ids[: part.num_tokens].tolist()
            assert set(part.turns[part.loss_mask > 0].tolist()) == {number}
            for name in ("token_ids", "logprobs", "versions", "advantage"):
                found = getattr(part, name)[part.loss_mask > 0]
                assert found.tolist() == getattr(sample, name)[its].tolist(), name


# ── their effects, simulated ─────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def long_tailed():
    scenario = Scenario(
        steps=2, alpha=0, grain=200, batch_size=64, group_size=8,
        rollout={"filters": ["equal_rewards"]},
        workers={"count": 8, "max_running": 8, "step_s": 0.02},
        workload={
            "success_rate": 0.1,
            "response_tokens": {
                "kind": "lognormal", "mean": 2000, "sigma": 1, "at_most": 16_000,
            },
        },
    )  # fmt: skip
    return lambda changes: simulate(scenario.changed(changes))


def test_each_feature_shows_in_the_simulator(long_tailed):
    queue = long_tailed({})
    assert long_tailed({"rollout.schedule": "batch"}).time_s > 1.1 * queue.time_s
    assert long_tailed({"rollout.redundant_groups": 8}).time_s < 0.6 * queue.time_s
    spares = long_tailed({"rollout.redundant_episodes": 2})
    assert spares.time_s < 0.8 * queue.time_s
    assert spares.outcomes["cancelled(redundant)"] > 0
    assert queue.outcomes["dropped(filtered:equal_rewards)"] > 0


def test_prompts_that_are_not_replicated_pile_up_at_one_worker(long_tailed):
    crowded = {"workers.max_running": 4, "rollout.filters": (), "batch_size": 128}
    apart, together = (
        long_tailed({**crowded, "rollout.replicate": replicate}) for replicate in (True, False)
    )
    assert together.time_s > apart.time_s
    assert together.idle_workers > apart.idle_workers
