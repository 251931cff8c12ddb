"""`flash plan`: the search, the hardware's times, the command."""

import json
import re

import pytest
import yaml

from flash.cli import main as cli
from flash.simulate import Scenario, load, simulate
from flash.simulate.hardware import (
    GPUS,
    Model,
    gpus_of_worker,
    on_hardware,
    trainer_times,
    worker_times,
)
from flash.simulate.plan import _least_waste, plan
from flash.simulate.plan_command import _duration


def workload(**changes) -> Scenario:
    """A sample takes 2 GPU seconds of a worker and 2 of the trainer."""
    return Scenario(
        steps=100, batch_size=32, group_size=4, grain=50,
        workers={"max_running": 5, "step_s": 0.01},
        trainer={"token_gpu_s": 0.002},
        workload={
            "prompt_tokens": 1, "env_step_s": 1,
            "response_tokens": {"kind": "uniform", "low": 800, "high": 1200},
        },
    ).changed(changes)  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return plan(workload(), gpus=12, alphas=[0, 1, 2])


def test_the_split_follows_the_work(found):
    """Workers need 1000·0.01/5 = 2 s a sample, the trainer 1000·0.002 = 2 s: half and half."""
    for choice in found.best[1:]:
        assert choice.workers + choice.trainer_gpus == 12
        assert 5 <= choice.workers <= 8


@pytest.mark.slow
def test_the_search_finds_what_trying_everything_finds(found):
    (everything,) = plan(workload(), gpus=12, alphas=[1]).best
    speeds = {}
    for workers in range(1, 12):
        split = {"alpha": 1, "workers.count": workers, "trainer.gpus": 12 - workers, "steps": 10}
        speeds[workers] = simulate(workload(**split)).samples_per_s
    assert everything.result.samples_per_s >= 0.97 * max(speeds.values())


def test_the_least_age_is_taken_among_the_quick_ones(found):
    quickest = max(choice.result.samples_per_s for choice in found.best)
    assert found.recommended.result.samples_per_s >= 0.95 * quickest
    for choice in found.best:
        if choice.result.samples_per_s >= 0.95 * quickest:
            assert found.recommended.result.staleness_mean <= choice.result.staleness_mean
    assert found.recommended.alpha > 0, "synchronous is slow"


@pytest.mark.slow
def test_each_choice_says_what_limits_it():
    def why(**changes):
        (choice,) = plan(workload(**changes), gpus=2, alphas=[2]).best
        return choice.why

    assert "trainer never waits" in why(**{"trainer.token_gpu_s": 0.02})
    assert "workers are always busy" in why(**{"workers.step_s": 0.1})
    assert "slowest episodes" in why(**{"workload.env_step_s": 100})


@pytest.mark.slow
def test_redundancy_is_taken_where_a_long_tail_pays_for_it():
    tail = {"workload.env_step_s": {"kind": "pareto", "mean": 20, "shape": 1.2}}
    slow = plan(workload(**tail), gpus=4, alphas=[1])
    assert slow.recommended.redundant_groups or slow.recommended.redundant_episodes
    plain = [c for c in slow.tried if not c.redundant_groups and not c.redundant_episodes]
    gain = slow.recommended.result.samples_per_s / max(c.result.samples_per_s for c in plain)
    assert gain > 1.1
    for choice in slow.tried:
        rollout = choice.result.scenario.rollout
        assert rollout.redundant_groups == choice.redundant_groups
        assert rollout.redundant_episodes == choice.redundant_episodes


@pytest.mark.slow
def test_of_redundancies_that_are_nearly_as_quick_the_one_that_wastes_least_is_taken():
    tail = {"workload.env_step_s": {"kind": "pareto", "mean": 20, "shape": 1.2}}
    slow = plan(workload(**tail), gpus=2, alphas=[1])
    quickest = max(choice.result.samples_per_s for choice in slow.tried)
    nearly = [c for c in slow.tried if c.result.samples_per_s >= 0.95 * quickest]
    least = min(choice.result.wasted_share for choice in nearly)
    assert max(choice.result.wasted_share for choice in nearly) > least + 0.05
    assert slow.recommended.result.wasted_share == least
    assert _least_waste(slow.tried[::-1]).result.wasted_share == least, "in whatever order"


def test_redundancy_that_brings_nothing_is_not_taken(found):
    assert any(choice.redundant_episodes for choice in found.tried), "it was tried"
    for choice in found.best[1:]:
        assert not choice.redundant_groups
        assert not choice.redundant_episodes


def test_the_command_prints_the_plan_and_keeps_a_scenario_that_runs(tmp_path, capsys):
    path = tmp_path / "work.yaml"
    path.write_text(yaml.safe_dump(workload().model_dump(mode="json", exclude_unset=True)))
    arguments = ["plan", str(path), "--gpus", "4", "--alphas", "0,1", "--out", str(tmp_path)]
    assert cli.run(arguments) == 0
    out = capsys.readouterr().out
    assert "best of each alpha" in out
    assert "take alpha=1 with 2 workers and 2 GPUs for the trainer" in out
    said = r"(\S+) samples/s; 100 steps would take ([\d.]+) min in all, (\S+) GPU hours"
    samples_per_s, minutes, gpu_hours = map(float, *re.findall(said, out))
    assert minutes * 60 == pytest.approx(100 * workload().batch_size / samples_per_s, rel=0.01)
    assert gpu_hours == pytest.approx(4 * minutes / 60, rel=0.02)
    assert out.count(f" {minutes} min ") >= 2, "in the row of what is tried, and of the best"
    best = load(tmp_path / "best.yaml")
    assert (best.alpha, best.workers.count, best.trainer.gpus) == (1, 2, 2)
    tried = json.loads((tmp_path / "plan.json").read_text())
    assert {choice["workers"] for choice in tried} == {1, 2, 3}
    assert (tmp_path / "frontier.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(41.4, "41 s"), (120, "2.0 min"), (7000, "116.7 min"), (7200, "2.0 h"), (1e6, "11.6 days")],
)
def test_a_runs_length_is_told_in_a_unit_that_suits_it(seconds, said):
    assert _duration(seconds) == said


def test_of_a_run_that_ends_by_its_time_is_told_how_far_it_gets(tmp_path, capsys):
    path = tmp_path / "work.yaml"
    settings = workload().model_dump(mode="json", exclude_unset=True)
    path.write_text(yaml.safe_dump(settings | {"steps": None, "time_s": 7200}))
    arguments = ["plan", str(path), "--gpus", "2", "--alphas", "1", "--out", str(tmp_path)]
    assert cli.run(arguments) == 0
    said = r"(\S+) samples/s; 2\.0 h would do for (\d+) steps"
    samples_per_s, steps = map(float, *re.findall(said, capsys.readouterr().out))
    assert steps == pytest.approx(7200 * samples_per_s / workload().batch_size, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FILE"], "and --gpus N"),
        (["--gpus", "8"], "Give a scenario's YAML file or --calibrate RUN"),
        (["FILE", "--gpus", "1"], "a worker takes 1 and the trainer at least 1"),
        (["FILE", "--gpus", "8", "--alphas", "0,b"], "alpha='b': must be a number"),
        (["FILE", "--gpus", "8", "--alphas", ".inf"], "alpha=inf: must be a finite number"),
        (["FILE", "--gpus", "8", "--alphas", ""], "--alphas is empty: write --alphas A,B,…"),
        (["FILE", "--gpus", "8", "--out", "FILE"], "work.yaml: File exists; name a folder"),
        (["FILE", "--gpus", "8", "--gpu", "h100"], "--gpu and --model go together"),
        (["FILE", "--gpus", "8", "--gpu", "h100", "--model", "8"], "all parameters"),
        (["FILE", "--gpus", "8", "--gpu", "h100", "--model", "me/it"], "a config.json"),
    ],
)
def test_a_mistake_is_told_with_its_remedy(tmp_path, capsys, arguments, message):
    path = tmp_path / "work.yaml"
    path.write_text(yaml.safe_dump(workload().model_dump(mode="json", exclude_unset=True)))
    words = [str(path) if word == "FILE" else word for word in arguments]
    assert cli.run(["plan", *words]) == 2
    assert message in capsys.readouterr().err


QWEN3_8B = {
    "num_hidden_layers": 36, "hidden_size": 4096, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12_288, "vocab_size": 151_936,
}  # fmt: skip


def test_a_models_size_is_read_from_its_configuration(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    model = Model.parse(str(tmp_path))
    assert model.parameters == pytest.approx(8.19e9, rel=0.01)
    assert model.kv_bytes == 36 * 2 * 8 * 128 * 2


def test_times_follow_from_the_data_sheet():
    model, gpu = Model(8e9, 131_072), GPUS["h100"]
    assert gpus_of_worker(model, gpu) == 1
    assert gpus_of_worker(Model(70e9, 327_680), gpu) == 4
    one, two = worker_times(model, gpu, 1), worker_times(model, gpu, 2)
    # 16 GB at 0.7 of 3.35 TB/s, and 2 ms.
    assert one["step_s"] == pytest.approx(0.0068 + 0.002, rel=0.01)
    assert two["step_s"] - 0.002 == pytest.approx((one["step_s"] - 0.002) / 2)
    assert one["kv_tokens"] == pytest.approx((72e9 - 16e9) / 131_072, rel=0.01)
    # 8 operations a parameter and token, at 0.35 of 989 TFLOP/s.
    assert trainer_times(model, gpu)["token_gpu_s"] == pytest.approx(8 * 8e9 / 346e12, rel=0.01)
    with pytest.raises(ValueError, match="don't fit"):
        worker_times(Model(70e9, 327_680), gpu, 1)


def test_fields_that_are_given_are_kept(tmp_path):
    scenario = workload(**{"workers.gpus": 2, "workers.load_s": 9})
    placed = on_hardware(scenario, "8e9", "h100", keep=["workers.gpus", "workers.load_s"])
    assert (placed.workers.gpus, placed.workers.load_s) == (2, 9)
    assert placed.workers.step_s != scenario.workers.step_s
