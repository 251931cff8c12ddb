"""Scenarios: what they take, and what they say of mistakes."""

import json
import math
import random
from statistics import fmean
from typing import get_type_hints

import pytest

from flash.config import Config, validated
from flash.rollout.config import RolloutSettings
from flash.rollout.loop import RolloutLoop
from flash.simulate import Scenario, load
from flash.simulate.distributions import Distribution


def test_a_file_is_named_after_itself_and_fields_change_it(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("steps: 3\nworkload: {turns: 5}\n")
    scenario = load(path, {"alpha": 2, "workload.turns.mean": 7, "workers.count": 4})
    assert (scenario.name, scenario.alpha, scenario.workers.count) == ("mine", 2, 4)
    assert scenario.workload.turns == Distribution(kind="constant", mean=7)
    again = scenario.changed({"trainer.gpus": 8})
    assert (again.workers.count, again.trainer.gpus, again.gpus) == (4, 8, 12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give steps or time_s"),
        ({"steps": 1, "alfa": 1}, "alfa: unknown field; did you mean alpha?"),
        ({"steps": 1, "batch_size": 30}, "batch_size=30 is not divisible by group_size=8: use 24"),
        ({"steps": 1, "alpha": -1}, "alpha=-1: must be at least 0"),
        ({"steps": 1, "alpha": math.inf}, "alpha=inf: must be a finite number"),
        ({"steps": 1, "trainer": {"batch_s": math.inf}}, "trainer.batch_s=inf: must be a finite"),
        ({"steps": 1, "rollout": {"filters": ["even"]}}, "rollout.filters: 'even' is not one of"),
        ({"steps": 1, "redundant_groups": 1}, "did you mean rollout.redundant_groups?"),
        ({"steps": 1, "workload": {"replay": "no/run"}}, "workload.replay='no/run': no/run/episod"),
        (
            {"steps": 1, "workload": {"env_fail_rate": 0.5, "env_hang_rate": 0.6}},
            "workload.env_fail_rate=0.5 and workload.env_hang_rate=0.6 are more than all calls",
        ),
        (
            {"steps": 1, "workload": {"prompt_tokens": 200_000}},
            "workload.prompt_tokens of 200000 leave no room to answer in max_sequence_tokens=",
        ),
        ({"steps": 1, "workers": {"kv_tokens": 1000}}, "workers.kv_tokens=1000 can't hold"),
        ({"steps": 1, "workers": {"step_s": 0}}, "give a step some time"),
        (
            {"steps": 1, "workload": {"turns": {"kind": "pareto", "mean": 1}}},
            "workload.turns: kind=pareto needs shape",
        ),
        (
            {"steps": 1, "workload": {"turns": {"kind": "normal", "mean": 1, "std": 1, "low": 1}}},
            "kind=normal takes mean and std: leave out low",
        ),
        (
            {"steps": 1, "workload": {"turns": {"kind": "uniform", "low": 2, "high": 1}}},
            "low=2 is above high=1",
        ),
        ({"steps": 1, "workload": {"turns": {"kind": "gauss"}}}, "workload.turns.kind='gauss'"),
        (
            {"steps": 1, "workload": {"turns": {"kind": "empirical", "values": []}}},
            "at least one",
        ),
    ],
)
def test_a_mistake_is_one_line_with_its_field_and_a_remedy(settings, message):
    with pytest.raises(ValueError) as error:
        validated(Scenario, settings)
    assert message in str(error.value)


def test_a_scenario_a_run_and_a_loop_take_one_set_of_rollout_settings():
    of_loop = get_type_hints(RolloutLoop.__init__)["settings"]
    of_run, of_scenario = (model.model_fields["rollout"] for model in (Config, Scenario))
    assert of_loop is of_run.annotation is of_scenario.annotation is RolloutSettings
    assert not Scenario.model_fields.keys() & RolloutSettings.model_fields.keys(), "no copies"


@pytest.mark.parametrize(
    ("setting", "value"),
    [("adaptive_alpha", {"min_ess": 0.9}), ("stall_timeout_s", 600.0), ("on_stall", "stop")],
)
def test_a_setting_that_means_nothing_in_a_simulation_is_refused(setting, value):
    """Even its default: whoever writes it down expects something of it."""
    with pytest.raises(ValueError, match=rf"^rollout.{setting} is not simulated: .*leave it out"):
        validated(Scenario, {"steps": 1, "rollout": {setting: value}})


def test_all_settings_that_are_refused_are_told_at_once():
    given = {"on_stall": "stop", "stall_timeout_s": 600.0, "replicate": False}
    with pytest.raises(ValueError) as error:
        validated(Scenario, {"steps": 1, "rollout": given})
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        "rollout.stall_timeout_s", "rollout.on_stall",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "distribution",
    [
        Distribution(kind="constant", mean=3),
        Distribution(kind="uniform", low=1, high=5),
        Distribution(kind="normal", mean=3, std=0.5),
        Distribution(kind="lognormal", mean=3, sigma=1),
        Distribution(kind="pareto", mean=3, shape=3),
        Distribution(kind="empirical", values=(1, 2, 6)),
    ],
    ids=lambda d: d.kind,
)
def test_means_are_what_was_asked_for_and_what_is_drawn(distribution):
    sampler, rng = distribution.sampler(), random.Random(0)
    assert sampler.mean() == pytest.approx(3, rel=0.01)
    assert fmean(sampler.draw(rng) for _ in range(40_000)) == pytest.approx(3, rel=0.03)


def test_the_largest_of_many_is_as_large_as_drawn():
    sampler, rng = Distribution(kind="lognormal", mean=3, sigma=1).sampler(), random.Random(0)
    drawn = fmean(max(sampler.draw(rng) for _ in range(64)) for _ in range(2000))
    assert sampler.mean_of_largest(64) == pytest.approx(drawn, rel=0.03)


def test_what_is_drawn_is_never_negative_nor_above_its_end():
    sampler, rng = (
        Distribution(kind="normal", mean=10, std=10, at_most=20).sampler(),
        random.Random(0),
    )
    drawn = [sampler.draw(rng) for _ in range(1000)]
    assert (min(drawn), max(drawn)) == (0, 20)


def episode(**changes):
    line = {
        "episode": 1,
        "seed": 0,
        "prompt_tokens": 9,
        "admitted_s": 0,
        "ended_s": 9,
        "trained_at_version": 0,
        "reward": 1.0,
        "turns": 2,
        "generated_tokens": 100,
        "stages_s": {"env": 3.0},
    }
    return json.dumps(line | changes) + "\n"


def test_an_empirical_one_takes_the_episodes_of_a_run_that_came_to_their_ends(tmp_path):
    cut_off = episode(reward=None, generated_tokens=10**6)
    (tmp_path / "episodes.jsonl").write_text(episode() + cut_off + episode(turns=1))
    for of, values in {
        "response_tokens": [50, 100], "turns": [1, 2], "env_step_s": [1.5, 3], "reward_s": [0, 0],
    }.items():  # fmt: skip
        distribution = Distribution(kind="empirical", run=tmp_path, of=of)
        assert distribution.sampler().values == values


def test_a_run_without_episodes_is_a_mistake(tmp_path):
    with pytest.raises(ValueError, match="holds no episode that came to its end"):
        Distribution(kind="empirical", run=tmp_path, of="turns")
