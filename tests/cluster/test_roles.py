"""What the roles of a run on a cluster are started with."""

import os
from pathlib import Path

from flash import config as configuration
from flash.cluster import roles
from flash.cluster.place import Place

TOKEN = "made up, and long enough"


def plan(tmp_path, **changes):
    overrides = {"cluster": "ray", "runs_dir": str(tmp_path / "runs"), **changes}
    config = configuration.load("frozen_lake", overrides)
    return roles.plan_of(config, token=TOKEN, marker=tmp_path / "marker")


def test_the_controller_plays_nothing_and_lets_explorers_in_where_its_node_is_reached(tmp_path):
    planned = plan(tmp_path, **{"cluster.explorers.max": 3, "engine.workers": 2})
    settings = roles.controller_settings(planned, host="10.0.0.7", folder=None)
    assert settings["engine"]["workers"] == 0
    assert settings["cluster"] == {"kind": "none"}
    assert settings["explorers"]["expected"] == 3
    assert settings["explorers"]["host"] == "10.0.0.7"
    assert settings["checkpoint"]["resume"] is False
    assert planned.workers == 2


def test_a_controller_that_starts_again_resumes_the_run_of_the_folder_it_had(tmp_path):
    folder = tmp_path / "runs" / "frozen_lake-2"
    settings = roles.controller_settings(plan(tmp_path), host="10.0.0.7", folder=folder)
    assert (settings["name"], settings["checkpoint"]["resume"]) == ("frozen_lake-2", True)


def test_its_settings_are_a_configuration_that_is_read_from_a_file(tmp_path, monkeypatch):
    planned = plan(tmp_path, **{"cluster.trainer.gpus": 4})
    for name, value in planned.variables.items():
        monkeypatch.setenv(name, value)
    settings = roles.controller_settings(planned, host="10.0.0.7", folder=None)
    config = configuration.load(str(roles.written(settings, tmp_path / "settings.yaml")))
    assert config.trainer.ranks == 4
    assert config.name == "frozen_lake"
    assert os.stat(tmp_path / "settings.yaml").st_mode & 0o077 == 0


def test_each_node_of_the_trainer_has_a_rank_for_each_of_its_gpus(tmp_path):
    planned = plan(tmp_path, **{"cluster.trainer.gpus": 4, "cluster.trainer.nodes": 2})
    assert planned.settings["trainer"]["ranks"] == 8


def test_keys_travel_as_variables_and_are_in_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LOG_URL", "postgresql://u:pass-phrase@h/d")
    planned = plan(tmp_path, **{"log.url": "$LOG_URL", "engine.api_key": "secret words"})
    assert "secret words" not in str(planned.settings)
    assert "pass-phrase" not in str(planned.settings)
    assert planned.settings["log"]["url"] == "$LOG_URL"
    named = planned.settings["engine"]["api_key"].removeprefix("$")
    assert planned.variables[named] == "secret words"
    assert planned.variables["LOG_URL"] == "postgresql://u:pass-phrase@h/d"
    assert TOKEN in planned.variables.values()


def test_an_explorer_has_the_gpus_that_it_was_given_and_the_runs_workers(tmp_path):
    planned = plan(tmp_path, **{"engine.workers": 2, "cluster.explorers.gpus": 2})
    place = Place("explorer-1", "1a2b", "n7", "10.0.0.7", 12, 8, (2, 3))
    command = roles.explorer_command(planned, place, tmp_path / "x")
    assert {"--engine.devices=2,3", "--engine.workers=2", "explorer-1"} <= set(command)
    assert command[-2:] == ["--relay", "10.0.0.7"]
    assert command[command.index("--wait_s") + 1] == "inf", "its role knows when the run is over"
    assert TOKEN not in str(command), "others read command lines"


def test_a_role_without_gpus_sees_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    planned = plan(tmp_path, **{"cluster.explorers.gpus": 1})
    assert roles.environment(planned, "controller")["CUDA_VISIBLE_DEVICES"] == ""
    assert roles.environment(planned, "explorer")["CUDA_VISIBLE_DEVICES"] == "5"


def test_a_node_without_the_folder_of_the_call_runs_roles_where_it_may(tmp_path, monkeypatch):
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    planned = plan(tmp_path)
    assert roles.working_directory(planned) == str(here)
    monkeypatch.chdir(tmp_path)
    here.rmdir()
    assert roles.working_directory(planned) is None


def test_paths_do_not_depend_on_where_a_role_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(plan(tmp_path, runs_dir="out").settings["runs_dir"]) == tmp_path / "out"


def test_an_explorer_has_all_hosts_elsewhere_or_none(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text("def score(transcript):\n    return 0\n")
    monkeypatch.chdir(tmp_path)
    reward = {"name": "process", "run": "my_scores:score", "concurrency": 3}
    changes = {"env.hosts": 2, "reward": reward}
    assert plan(tmp_path, **changes).hosts == 0
    assert plan(tmp_path, **changes, **{"cluster.hosts.cpus": 1}).hosts == 5
    sets = {"easy": {}, "hard": {"env": {"name": "frozen_lake", "hosts": 7}}}
    planned = plan(tmp_path, **changes, **{"cluster.hosts.cpus": 1, "task_sets": sets})
    assert planned.hosts == (2 + 3) + (7 + 3)
