"""Closed forms against simulations."""

import functools

import pytest

from flash.simulate import Scenario, simulate, theory


def job(*, alpha, update_s, response, count=4, max_running=64, steps=41, **workload):
    """One turn a sample, a token each 0.01 s however many run: rollouts take what they take."""
    return Scenario(
        steps=steps, alpha=alpha, batch_size=32, group_size=8, grain=50,
        workers={"count": count, "max_running": max_running, "step_s": 0.01},
        trainer={"batch_s": update_s},
        workload={"response_tokens": response, "prompt_tokens": 1, **workload},
    )  # fmt: skip


def measured_step_s(result):
    """In the steady state: over whole cycles of 1+α steps, which may be of different lengths."""
    return (result.steps[40].time_s - result.steps[10].time_s) / 30


@functools.cache
def all_alike(alpha, update_s):
    """Every rollout takes 20 s."""
    return simulate(job(alpha=alpha, update_s=update_s, response=2000, count=8))


@pytest.mark.parametrize("alpha", [0, 1, 2, 4])
@pytest.mark.parametrize("update_s", [2.0, 7.0, 30.0])
def test_the_time_of_a_step_is_as_predicted_when_all_rollouts_are_alike(alpha, update_s):
    """Long rollouts and a quick trainer, or the other way round, or neither."""
    result = all_alike(alpha, update_s)
    predicted = theory.step_s(alpha=alpha, rollout_s=20.0, update_s=update_s)
    assert measured_step_s(result) == pytest.approx(predicted, rel=0.02)


@pytest.mark.parametrize("alpha", [1, 2, 4])
@pytest.mark.parametrize("update_s", [2.0, 7.0, 30.0])
def test_the_mean_age_is_as_predicted_when_all_rollouts_are_alike(alpha, update_s):
    result = all_alike(alpha, update_s)
    predicted = theory.mean_age(alpha=alpha, rollout_s=20.0, step_s=measured_step_s(result))
    late = [step.staleness_mean for step in result.steps[10:40]]
    assert sum(late) / 30 == pytest.approx(predicted, abs=0.1)


def test_more_alpha_than_enough_brings_nothing():
    enough = theory.enough_alpha(rollout_s=20.0, update_s=10.0)
    assert enough == 2
    speeds = [all_alike(alpha, 10.0).samples_per_s for alpha in (1, enough, 4)]
    assert speeds[0] < 0.8 * speeds[1]
    assert speeds[2] == pytest.approx(speeds[1], rel=0.01)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "response",
    [
        {"kind": "lognormal", "mean": 500, "sigma": 1.0, "at_most": 8000},
        {"kind": "pareto", "mean": 500, "shape": 1.2, "at_most": 8000},
    ],
    ids=lambda r: r["kind"],
)
def test_synchronous_rollout_stays_within_its_bound(response, seed):
    """Batch by batch: with the mean and the largest of the batch's own rollouts."""
    scenario = job(alpha=0, update_s=1.0, response=response, count=2, max_running=8, steps=10)
    result = simulate(scenario.changed({"seed": seed}))
    for step in result.steps:
        of_step = [e for e in result.episodes if e.trained_at_version == step.step - 1]
        seconds = [0.01 * e.generated_tokens * 50 for e in of_step]
        bound = theory.rollout_bound_s(sum(seconds) / 32, max(seconds), at_a_time=16, under_way=32)
        assert 0.5 * bound < step.wait_s / 32 <= bound


@pytest.mark.parametrize("alpha", [0, 1, 2, 4])
def test_a_run_stays_within_its_bound(alpha):
    """40 resources, split in two as the proposition does it."""
    response = {"kind": "lognormal", "mean": 500, "sigma": 1.0, "at_most": 8000}
    train_s = 10.0  # of a sample on one resource: as long as its rollout needs, so 20 and 20
    split = 1 if alpha == 0 else 2
    scenario = job(
        alpha=alpha, update_s=32 * train_s * split / 40, response=response,
        count=4, max_running=10 // split,
    )  # fmt: skip
    sampler = scenario.workload.response_tokens.sampler()
    result = simulate(scenario)
    bound = theory.run_bound_s(
        32, mean_s=0.01 * sampler.mean(), longest_s=80.0, train_s=train_s, resources=40,
        alpha=alpha,
    )  # fmt: skip
    assert 0.3 * bound < measured_step_s(result) <= bound
