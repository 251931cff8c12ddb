"""Whole simulations: the same every time, true to the engine's invariants, and fast."""

import json
import os
import subprocess
import sys
import time
from collections import Counter

import pytest

from flash.errors import FlashError
from flash.simulate import Scenario, simulate
from flash.simulate.world import World

SMALL = {
    "steps": 6,
    "alpha": 1,
    "batch_size": 32,
    "group_size": 4,
    "max_sequence_tokens": 20_000,
    "workers": {
        "count": 3, "max_running": 8, "kv_tokens": 20_000, "step_s": 0.01, "request_s": 0.0005,
        "context_s": 1e-7, "prefill_s": 1e-4, "load_s": 0.5,
    },
    "trainer": {"batch_s": 5, "token_gpu_s": 1e-4, "export_s": 1},
    "workload": {
        "prompt_tokens": 300, "turns": {"kind": "uniform", "low": 1, "high": 4},
        "response_tokens": {"kind": "lognormal", "mean": 400, "sigma": 1.0},
        "observation_tokens": 100, "env_step_s": {"kind": "pareto", "mean": 2, "shape": 1.5},
    },
}  # fmt: skip


def small(**changes) -> Scenario:
    return Scenario.model_validate(SMALL).changed(changes)


def test_the_same_seed_gives_the_same_trace_in_another_process_too():
    here = simulate(small()).digest
    assert simulate(small()).digest == here
    program = (
        "import json, sys; from flash.simulate import Scenario, simulate; "
        "print(simulate(Scenario.model_validate(json.loads(sys.argv[1]))).digest)"
    )
    there = subprocess.run(
        [sys.executable, "-c", program, json.dumps(SMALL)],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert there.stdout.strip() == here


def test_another_seed_gives_another_trace():
    assert simulate(small(seed=1)).digest != simulate(small()).digest


def test_a_synchronous_step_is_the_sum_of_its_parts():
    scenario = Scenario(
        steps=3, alpha=0, batch_size=8, group_size=4, grain=1,
        workers={"count": 2, "step_s": 0.01, "load_s": 0.25, "overhead_s": 0.1},
        trainer={"gpus": 4, "batch_s": 5, "token_gpu_s": 0.001, "export_s": 1},
        workload={
            "prompt_tokens": 30, "response_tokens": 100, "turns": 2, "observation_tokens": 20,
            "env_reset_s": 0.5, "env_step_s": 2, "reward_s": 3,
        },
    )  # fmt: skip
    result = simulate(scenario)
    tokens = 8 * (30 + 100 + 20 + 100)
    rollout_s = 0.5 + 2 * (100 * 0.01 + 0.1) + 2 * 2 + 3
    for step in result.steps:
        assert step.tokens == tokens
        assert step.train_s == pytest.approx(5 + tokens * 0.001 / 4)
        assert step.publish_s == pytest.approx(1 + 2 * 0.25)
        assert step.wait_s == pytest.approx(rollout_s)
    assert result.time_s == pytest.approx(
        sum(s.wait_s + s.train_s + s.publish_s for s in result.steps)
    )
    assert result.steps[-1].time_s == pytest.approx(result.time_s)


def test_alpha_zero_trains_what_its_own_weights_sampled():
    result = simulate(small(alpha=0))
    assert set(result.ages) == {0}
    assert result.staleness_mean == result.staleness_max == 0


@pytest.mark.parametrize("alpha", [0.5, 1, 2])
@pytest.mark.parametrize("on_stale", ["regenerate", "wait", "drop"])
def test_no_trained_token_is_older_than_alpha(alpha, on_stale):
    result = simulate(small(**{"alpha": alpha, "rollout.on_stale": on_stale}))
    assert result.staleness_max <= alpha
    assert result.trained == 6 * 32


def test_asynchrony_hides_the_trainers_time():
    sync, overlapped = simulate(small(alpha=0)), simulate(small(alpha=2))
    assert overlapped.samples_per_s > 1.2 * sync.samples_per_s
    assert overlapped.idle_workers < sync.idle_workers


def test_two_alphas_are_compared_on_the_same_episodes():
    """The n-th episode of a task is the same one, whatever the schedule."""

    def lengths(result):
        first = {}
        for e in sorted(result.episodes, key=lambda e: e.episode):
            if e.outcome == "trained" and e.attempt == 1:
                first.setdefault(e.seed, []).append(e.turns)
        return {seed: Counter(turns) for seed, turns in first.items() if len(turns) == 4}

    sync, overlapped = lengths(simulate(small(alpha=0))), lengths(simulate(small(alpha=0.5)))
    shared = sync.keys() & overlapped.keys()
    assert len(shared) > 20
    same = sum(sync[seed] == overlapped[seed] for seed in shared)
    assert same > 0.7 * len(shared), "but for those that were given up and drawn anew"


def test_responses_to_one_task_are_alike_in_length_by_their_scale():
    wide = {"kind": "uniform", "low": 0.1, "high": 10}
    settings = {"workload.response_tokens": 100, "workload.turns": 1}
    world = World(small(**settings, **{"workload.response_scale": wide}))
    lengths = [{world.begin(task).response_tokens[0] for _ in range(4)} for task in range(50)]
    assert all(len(of_task) == 1 for of_task in lengths)
    of_tasks = [length for of_task in lengths for length in of_task]
    assert min(of_tasks) < 200
    assert max(of_tasks) > 800


def test_the_grain_hardly_matters():
    fine, coarse = simulate(small(grain=4)), simulate(small(grain=40))
    assert coarse.samples_per_s == pytest.approx(fine.samples_per_s, rel=0.1)
    assert coarse.tokens_per_s == pytest.approx(fine.tokens_per_s, rel=0.1)


def test_failures_and_hangs_are_counted_and_replaced():
    rates = {"workload.env_fail_rate": 0.03, "workload.env_hang_rate": 0.01}
    result = simulate(small(**rates, **{"workload.step_timeout_s": 30.0}))
    assert result.trained == 6 * 32
    assert result.outcomes["failed(env)"] > 0


def test_a_run_that_can_not_go_on_says_so_as_the_real_one_would():
    with pytest.raises(FlashError, match="env_fail_rate"):
        simulate(small(**{"workload.env_fail_rate": 0.99}))


def test_a_group_is_given_up_after_as_many_failures_as_the_scenario_says():
    rates = {"workload.env_fail_rate": 0.03}
    assert "cancelled(group_failed)" not in simulate(small(**rates)).outcomes
    result = simulate(small(**rates, **{"rollout.max_attempts": 1}))
    assert result.outcomes["cancelled(group_failed)"] > 0


def test_filters_that_drop_more_than_the_scenario_allows_end_it():
    filtered = {"rollout.filters": ["equal_rewards"], "workload.success_rate": 1.0}
    with pytest.raises(FlashError, match="rollout.max_filtered allows 16 a batch"):
        simulate(small(**filtered, **{"rollout.max_filtered": 2}))


def test_steps_that_take_hours_are_no_stall():
    slow = {"workload.env_step_s": 7200, "workload.step_timeout_s": 1e4}
    assert simulate(small(steps=1, **slow)).time_s > 7200


def test_a_publish_that_lets_requests_end_first_takes_longer():
    kept, waited = (simulate(small(**{"workers.update_mode": m})) for m in ("keep", "wait"))
    assert kept.steps[0].publish_s == pytest.approx(1 + 3 * 0.5)
    assert waited.steps[0].publish_s > 1.1 * kept.steps[0].publish_s


def test_the_tokens_of_a_response_that_was_cut_off_are_counted_as_wasted():
    spares = {"rollout.redundant_episodes": 2, "workload.turns": 1}
    result = simulate(small(alpha=0, grain=10, steps=3, **spares))
    assert result.outcomes.keys() == {"trained", "cancelled(redundant)"}
    trained = 10 * sum(e.generated_tokens for e in result.episodes if e.outcome == "trained")
    decoded = result.tokens_per_s * result.time_s
    assert trained + result.wasted_tokens == pytest.approx(decoded, rel=0.02)
    assert result.wasted_share > 0.3


def test_the_time_limit_ends_it():
    result = simulate(small(steps=None, time_s=100.0))
    assert result.time_s == 100.0
    assert result.steps[-1].time_s <= 100.0


def test_rewards_take_their_time():
    quick, slow = simulate(small()), simulate(small(**{"workload.reward_s": 20}))
    assert slow.episode_s == pytest.approx(quick.episode_s + 20, rel=0.3)


@pytest.mark.slow
def test_an_hour_of_128_gpus_takes_less_than_a_minute_of_one_core():
    scenario = Scenario(
        time_s=3600, alpha=1, batch_size=512, group_size=8, max_tokens=8192,
        max_sequence_tokens=65_536,
        workers={
            "count": 24, "gpus": 4, "max_running": 64, "kv_tokens": 400_000, "step_s": 0.012,
            "request_s": 5e-5, "context_s": 2e-8, "prefill_s": 2e-5, "load_s": 0.5,
        },
        trainer={"gpus": 32, "batch_s": 5, "token_gpu_s": 8e-4, "export_s": 3},
        workload={
            "prompt_tokens": 1000, "turns": {"kind": "uniform", "low": 1, "high": 20},
            "response_tokens": {"kind": "lognormal", "mean": 400, "sigma": 1.0},
            "observation_tokens": 300, "env_step_s": {"kind": "lognormal", "mean": 3, "sigma": 1},
        },
    )  # fmt: skip
    assert scenario.gpus == 128
    began = time.process_time()
    result = simulate(scenario)
    assert time.process_time() - began < 60
    assert result.trained > 8000
