"""α in force: what is decided from a step's metrics, and what the loop makes of it."""

import asyncio

import msgspec
import pytest

from flash.agents.environment_agent import EnvironmentAgent
from flash.config import parse
from flash.errors import EnvFailure
from flash.fakes import FakeCrew, FakeEnvs, FakeStyle, FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.adaptive import AdaptiveAlpha, AlphaState
from flash.rollout.config import RolloutSettings
from flash.rollout.loop import RolloutLoop
from flash.types import Task
from flash.virtual_time import in_virtual_time
from tests.rollout.test_crew import played
from tests.steady import weights


def step(*, ess: float = 1.0, kl: float = 0.0, waited: float = 0.0) -> dict[str, float]:
    return {"importance/ess": ess, "kl_behaviour": kl, "idle/trainer": waited}


def told(adaptive: AdaptiveAlpha, metrics: dict[str, float], times: int) -> list[float]:
    return [adaptive.after_step(metrics) for _ in range(times)]


def test_alpha_is_halved_once_a_window_of_steps_has_too_small_a_sample():
    adaptive = AdaptiveAlpha(2, min_ess=0.9, window=3)
    assert told(adaptive, step(ess=0.8), 3) == [2, 2, 1]


def test_alpha_is_halved_where_kl_is_too_large_even_if_the_trainer_waits():
    adaptive = AdaptiveAlpha(2, max_kl=0.1, window=1)
    assert told(adaptive, step(kl=0.2, waited=0.9), 1) == [1]


def test_one_bad_step_among_good_ones_changes_nothing():
    adaptive = AdaptiveAlpha(2, min_ess=0.9, window=4)
    told(adaptive, step(), 3)
    assert adaptive.after_step(step(ess=0.7)) == 2


def test_what_was_under_way_before_a_change_is_not_judged_after_it():
    adaptive = AdaptiveAlpha(4, min_ess=0.9, window=2)
    alphas = told(adaptive, step(ess=0.5), 12)
    # Two steps, then four that were sampled under 4, then two, two that were under 2, two.
    assert alphas == [4, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 0.5]


def test_alpha_rises_while_the_trainer_waits_and_never_passes_the_bound():
    adaptive = AdaptiveAlpha(1, min_ess=0.9, window=1)
    adaptive.after_step(step(ess=0.5))
    alphas = told(adaptive, step(waited=0.5), 8)
    assert alphas[0] == 0.5
    assert alphas[-1] == 1
    assert max(alphas) == 1


def test_alpha_stays_where_samples_are_fresh_and_the_trainer_is_busy():
    adaptive = AdaptiveAlpha(4, min_ess=0.9, window=1)
    adaptive.after_step(step(ess=0.5))
    assert told(adaptive, step(waited=0.05), 9)[-1] == 2


def test_without_a_threshold_alpha_is_its_bound_and_no_metric_is_needed():
    assert AdaptiveAlpha(3).after_step({}) == 3


def test_alpha_never_falls_below_what_the_batches_between_two_publishes_need():
    adaptive = AdaptiveAlpha(4, min_ess=0.9, window=1, least=1)
    assert told(adaptive, step(ess=0.1), 30)[-1] == 1


def through_json(state: AlphaState) -> AlphaState:
    return msgspec.json.decode(msgspec.json.encode(state), type=AlphaState)


def test_a_resumed_run_decides_as_the_one_that_went_on():
    def new() -> AdaptiveAlpha:
        return AdaptiveAlpha(4, min_ess=0.9, window=2)

    steps = [step(ess=0.5)] * 3 + [step(waited=0.5)] * 9
    one = new()
    expected = [one.after_step(metrics) for metrics in steps]
    for stopped_after in range(len(steps)):
        before, after = new(), new()
        seen = [before.after_step(metrics) for metrics in steps[:stopped_after]]
        after.restore(through_json(before.state()))
        seen += [after.after_step(metrics) for metrics in steps[stopped_after:]]
        assert seen == expected


@pytest.mark.parametrize(
    ("bound", "settings", "alpha"),
    [(1, {"min_ess": 0.9}, 1), (4, {"min_ess": 0.9, "least": 3}, 3), (4, {}, 4)],
    ids=["a lower bound", "more batches between publishes", "no threshold any more"],
)
def test_a_resumed_run_with_other_settings_begins_within_them(bound, settings, alpha):
    before = AdaptiveAlpha(4, min_ess=0.9, window=1)
    assert before.after_step(step(ess=0.5)) == 2
    resumed = AdaptiveAlpha(bound, **settings)
    resumed.restore(before.state())
    assert resumed.alpha == alpha


def test_thresholds_where_nothing_may_be_stale_are_refused():
    with pytest.raises(ValueError, match="adaptive_alpha with alpha=0"):
        parse({"env": "frozen_lake", "alpha": 0, "rollout": {"adaptive_alpha": {"min_ess": 0.9}}})


def rollouts(hub: InferenceHub, **options: float) -> RolloutLoop:
    settings = {"max_tokens": 4, "step_timeout_s": 10.0, "episode_timeout_s": 100.0}
    return RolloutLoop(
        hub,
        agent=lambda: EnvironmentAgent(envs=FakeEnvs(), style=FakeStyle(), **settings),
        tasks=(Task(seed) for seed in range(10**6)),
        batch_size=4,
        group_size=2,
        **options,
    )


async def trained(loop: RolloutLoop, versions: range) -> list[float]:
    """The oldest token of each batch, with a trainer that rollout is always ahead of."""
    oldest = []
    for version in versions:
        batch = await loop.next_batch()
        oldest.append(batch.metrics["staleness/max"])
        await asyncio.sleep(1000)
        await loop.publish(weights(version))
    return oldest


@in_virtual_time
async def test_with_less_alpha_in_force_samples_get_younger_and_none_is_thrown_away():
    async with InferenceHub([FakeWorker("w")]) as hub, rollouts(hub, alpha=4) as loop:
        assert (await trained(loop, range(1, 10)))[-1] == 4
        loop.use_alpha(1)
        assert (await trained(loop, range(10, 20)))[-1] == 1
        assert loop.ledger.count("dropped") == loop.ledger.count("cancelled") == 0
        loop.use_alpha(4)
        assert (await trained(loop, range(20, 30)))[-1] == 4


@in_virtual_time
async def test_a_loop_may_begin_with_less_than_its_bound_and_can_not_be_given_more():
    async with InferenceHub([FakeWorker("w")]) as hub:
        loop = rollouts(hub, alpha=4)
        loop.use_alpha(0.5)
        async with loop:
            assert loop.ledger.running == 6
        with pytest.raises(ValueError, match=r"alpha=5 .* bound of 4"):
            loop.use_alpha(5)


@in_virtual_time
async def test_with_less_alpha_in_force_groups_that_have_begun_come_to_their_ends():
    """One episode of each fails meanwhile, and what is ready alone is more than there is room
    for now."""
    async with InferenceHub([FakeWorker("w")]) as hub:
        crew = FakeCrew(
            hub,
            lambda e: EnvFailure("lost") if e.id % 2 and e.attempt == 1 else played(hub.version),
        )
        async with RolloutLoop(
            hub, crew=crew, tasks=map(Task, range(10**6)), batch_size=4, group_size=2, alpha=4,
            settings=RolloutSettings(stall_timeout_s=60),
        ) as loop:  # fmt: skip
            await asyncio.sleep(0.5)
            assert len(crew.begun) == loop.capacity == 20
            loop.use_alpha(0)
            async with asyncio.timeout(10):
                batch = await loop.next_batch()
            assert {sample.episode for sample in batch.samples if sample.episode >= 20}
            assert {e.group for e in crew.begun} == set(range(10)), "and no other begins"
