"""Calibration: from the files of a run whose truth is known, because it was simulated."""

import json
import random
from dataclasses import asdict

import pytest
import yaml

from flash.cli import main as cli
from flash.config import parse
from flash.rollout.config import RolloutSettings
from flash.simulate import Scenario, load, simulate
from flash.simulate.calibrate import calibrate
from flash.simulate.replay import RecordedEpisode, Replay, played


def truth(**changes) -> Scenario:
    return Scenario(
        steps=15, alpha=1, batch_size=32, group_size=4, max_tokens=64, max_sequence_tokens=2000,
        grain=1,
        workers={
            "count": 2, "max_running": 12, "kv_tokens": 32_000, "overhead_s": 0.02, "step_s": 0.02,
            "request_s": 0.002, "load_s": 0.3,
        },
        trainer={"batch_s": 3, "token_gpu_s": 5e-4, "export_s": 0.7},
        workload={
            "prompt_tokens": 40, "turns": {"kind": "uniform", "low": 1, "high": 6},
            "response_tokens": {"kind": "lognormal", "mean": 20, "sigma": 0.7},
            "observation_tokens": 15, "env_step_s": {"kind": "lognormal", "mean": 1, "sigma": 1},
        },
    ).changed(changes)  # fmt: skip


def write_run(folder, scenario):
    """The files that a real run would leave; returns what happened."""
    result = simulate(scenario)
    folder.mkdir()
    config = parse(
        {
            "env": "frozen_lake", "alpha": scenario.alpha, "batch_size": 32, "group_size": 4,
            "publish_every": scenario.publish_every, "stream": scenario.stream,
            "rollout": scenario.rollout.model_dump(exclude_unset=True),
            "engine": {
                "workers": 2, "max_running": 12, "cache_tokens": 32_000,
                "update_mode": scenario.workers.update_mode,
            },
            "agent": {"max_tokens": 64, "max_sequence_tokens": 2000},
        }
    )  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    with (folder / "episodes.jsonl").open("w") as file:
        for episode in result.episodes:
            file.write(json.dumps(asdict(episode)) + "\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in result.steps:
            publishes = step.step // scenario.publish_every
            line = {
                "step": step.step,
                "time/wait_batch_s": step.wait_s,
                "time/train_s": step.train_s,
                "time/publish_s": step.publish_s,
                "publish/count": publishes,
                "publish/paused_s": 0.6 * publishes,
            }
            file.write(json.dumps(line) + "\n")
    return result


def change_config(run, **sections):
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    for name, changes in sections.items():
        config[name] |= changes
    path.write_text(yaml.safe_dump(config))


@pytest.mark.slow
def test_a_calibrated_simulation_takes_as_long_as_its_run(tmp_path):
    run = tmp_path / "run"
    write_run(run, truth())
    calibration = calibrate(run)
    assert abs(calibration.error) < 0.02
    workers, trainer = calibration.scenario.workers, calibration.scenario.trainer
    assert workers.load_s == pytest.approx(0.3)
    assert trainer.export_s == pytest.approx(0.7)
    assert trainer.batch_s == pytest.approx(3, rel=0.05)
    assert trainer.token_gpu_s == pytest.approx(5e-4, rel=0.1)
    assert calibration.scenario.workload.prompt_tokens.mean == pytest.approx(40, abs=3)
    assert calibration.scenario.workload.observation_tokens.mean == pytest.approx(15, abs=3)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0, 2])
def test_from_one_run_it_predicts_the_speed_up_of_another_alpha(tmp_path, alpha):
    """Fitted to a run at α=1, it says what α=0 and α=2 would have taken."""
    mine = write_run(tmp_path / "run", truth())
    other = write_run(tmp_path / "other", truth(alpha=alpha))
    fitted = calibrate(tmp_path / "run").scenario
    predicted = simulate(fitted.changed({"alpha": alpha})).time_s / simulate(fitted).time_s
    assert predicted == pytest.approx(other.time_s / mine.time_s, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"publish_every": 2, "alpha": 2, "stream": True, "rollout.filters": ["equal_rewards"]},
        {"rollout.redundant_groups": 4, "rollout.redundant_episodes": 2},
        {
            "rollout.on_stale": "wait", "rollout.replicate": False, "rollout.max_attempts": 5,
            "rollout.max_regenerations": 3, "rollout.max_filtered": 7,
            "workers.update_mode": "abort",
        },
    ],
)  # fmt: skip
def test_what_was_on_in_the_run_is_on_in_its_simulation(tmp_path, changes):
    told = truth(**changes)
    write_run(tmp_path / "run", told)
    calibration = calibrate(tmp_path / "run")
    again = calibration.scenario
    assert again.rollout == told.rollout
    assert again.workers.update_mode == told.workers.update_mode
    for name in ("alpha", "batch_size", "group_size", "publish_every", "stream"):
        assert getattr(again, name) == getattr(told, name)
    assert abs(calibration.error) < 0.1
    assert again.trainer.export_s == pytest.approx(0.7)


def test_what_a_simulation_has_no_use_for_is_left_out_of_the_runs_settings(tmp_path):
    """A filter of the user's own looks into tokens, of which a replay has only the number."""
    write_run(tmp_path / "run", truth(steps=3))
    change_config(
        tmp_path / "run",
        rollout={
            "filters": ["equal_rewards", "mine:too_long"],
            "on_stall": "replace", "stall_timeout_s": 60, "adaptive_alpha": {"min_ess": 0.9},
        },
    )  # fmt: skip
    assert calibrate(tmp_path / "run").scenario.rollout == RolloutSettings(filters="equal_rewards")


def test_workers_at_urls_are_counted_once(tmp_path):
    write_run(tmp_path / "run", truth(steps=3))
    urls = ["http://a:8000", "http://b:8000"]
    change_config(tmp_path / "run", engine={"urls": urls, "workers": 4})
    assert calibrate(tmp_path / "run").scenario.workers.count == 2


@pytest.mark.slow
def test_queueing_at_the_hub_is_not_taken_for_slow_workers(tmp_path):
    slow = {"workers.max_running": 4, "workers.count": 1, "workers.load_s": 0.6}
    result = write_run(tmp_path / "run", truth(**slow))
    change_config(tmp_path / "run", engine={"workers": 1, "max_running": 4})
    assert result.idle_workers < 0.1
    workers = calibrate(tmp_path / "run").scenario.workers
    # A response of 20 tokens, four in a step. What part of it goes with the tokens is not seen.
    a_request_s = workers.overhead_s + 20 * (workers.step_s + 4 * workers.request_s)
    assert a_request_s == pytest.approx(0.02 + 20 * 0.028, rel=0.1)


def test_what_was_given_up_goes_on_like_one_that_lasted_longer():
    def episode(number, life_s):
        return RecordedEpisode(number, number, 1, 1, 1, life_s, 0.0, 0.0, 1.0, 0.0, life_s, None)

    whole = [episode(n, float(n)) for n in range(1, 6)]
    replay = Replay(whole, [episode(7, 3.5), episode(8, 99.0)])
    longer = {replay.episode(7, 0, random.Random(seed)).ended_s for seed in range(50)}
    assert longer == {4.0, 5.0}
    assert replay.episode(8, 0, random.Random(0)).ended_s == 5.0, "the longest there is"


def test_a_replay_gives_each_task_its_own_episodes_first(tmp_path):
    write_run(tmp_path / "run", truth())
    episodes = played(tmp_path / "run")
    replay = Replay(episodes)
    own = sorted((e for e in episodes if e.task == 3), key=lambda e: e.number)
    assert [replay.episode(3, n, None) for n in range(len(own))] == own


def test_the_command_prints_the_fit_and_keeps_the_scenario(tmp_path, capsys):
    write_run(tmp_path / "run", truth())
    out = tmp_path / "out"
    assert cli.run(["simulate", "--calibrate", str(tmp_path / "run"), "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "15 steps in" in lines[0]
    assert [line.split()[0] for line in lines[3:5]] == ["0", "1"]
    assert load(out / "scenario.yaml").workload.replay == tmp_path / "run"


@pytest.mark.parametrize("missing", ["episodes.jsonl", "metrics.jsonl", "config.yaml"])
def test_a_folder_without_a_run_is_a_mistake(tmp_path, capsys, missing):
    write_run(tmp_path / "run", truth(steps=2))
    (tmp_path / "run" / missing).unlink()
    assert cli.run(["simulate", "--calibrate", str(tmp_path / "run")]) == 2
    assert missing in capsys.readouterr().err


def test_a_configuration_that_lacks_a_field_is_a_mistake(tmp_path, capsys):
    write_run(tmp_path / "run", truth(steps=2))
    path = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    del config["publish_every"]
    path.write_text(yaml.safe_dump(config))
    assert cli.run(["simulate", "--calibrate", str(tmp_path / "run")]) == 2
    assert "'publish_every'" in capsys.readouterr().err
