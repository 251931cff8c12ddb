"""`flash simulate`: its table, its files, its exit codes."""

import gzip
import itertools
import json

import pytest
import yaml

from flash.cli import main as cli
from tests.simulate.test_simulate import SMALL


@pytest.fixture
def scenario(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"steps": 2}))
    return path


def test_a_scenario_prints_a_row_and_writes_numbers_and_a_picture(scenario, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.run(["simulate", str(scenario), "--alpha", "2", "--out", str(out)]) == 0
    title, header, row, _ = capsys.readouterr().out.splitlines()
    assert "small: 4 GPUs" in title
    assert "alpha=2" in title
    assert header.split()[0] == "speed-up"
    assert row.split()[0] == "1.00x"
    (result,) = json.loads((out / "results.json").read_text())
    assert result["scenario"]["alpha"] == 2
    assert result["trained"] == 64
    assert (out / "picture.png").stat().st_size > 10_000


def test_a_sweep_prints_a_row_for_each_combination_and_averages_seeds(scenario, tmp_path, capsys):
    arguments = ["--sweep", "alpha=0,1", "--sweep", "workers.count=2,3", "--seeds", "2"]
    assert cli.run(["simulate", str(scenario), *arguments, "--out", str(tmp_path)]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:-1]]
    assert rows == [["0", "2"], ["0", "3"], ["1", "2"], ["1", "3"]]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["scenario"]["seed"] for r in results] == [0, 1] * 4
    assert results[-1]["changes"] == {"alpha": 1, "workers.count": 3}


def test_a_swept_value_may_be_a_list(scenario, tmp_path, capsys):
    arguments = ["--sweep", "rollout.filters=[],[equal_rewards]", "--out", str(tmp_path)]
    assert cli.run(["simulate", str(scenario), *arguments]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [r["scenario"]["rollout"]["filters"] for r in results] == [[], ["equal_rewards"]]
    assert "['equal_rewards']" in capsys.readouterr().out


def test_a_run_that_ends_before_its_first_batch_is_told_of(scenario, tmp_path, capsys):
    arguments = ["--steps", "null", "--time_s", "1", "--out", str(tmp_path)]
    assert cli.run(["simulate", str(scenario), *arguments]) == 0
    assert "time_s=1 ended before the first batch was trained" in capsys.readouterr().out
    assert (tmp_path / "picture.png").exists()


def test_a_timeline_has_a_lane_for_each_worker_each_agent_and_the_trainer(scenario, tmp_path):
    assert cli.run(["simulate", str(scenario), "--timeline", "--out", str(tmp_path)]) == 0
    packed = (tmp_path / "timeline.json.gz").read_bytes()
    events = json.loads(gzip.decompress(packed))["traceEvents"]
    lanes = {e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert lanes >= {"trainer", "worker 000", "worker 002", "agent 0000", "agent 0063"}
    spans = [e for e in events if e["ph"] == "X"]
    did = {"trainer": {"wait", "train", "publish"}, "agents": {"generate", "env", "reward"}}
    did["workers"] = {"sample", "load weights"}
    pids = {e["args"]["name"]: e["pid"] for e in events if e["name"] == "process_name"}
    for group, names in did.items():
        assert {e["name"] for e in spans if e["pid"] == pids[group]} == names
    by_lane = {}
    for span in spans:
        by_lane.setdefault((span["pid"], span["tid"]), []).append(span)
    for lane in by_lane.values():
        lane.sort(key=lambda span: span["ts"])
        for before, after in itertools.pairwise(lane):
            assert before["ts"] + before["dur"] <= after["ts"] + 1, "one thing at a time"
    cli.run(["simulate", str(scenario), "--timeline", "--out", str(tmp_path)])
    assert (tmp_path / "timeline.json.gz").read_bytes() == packed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Give a scenario's YAML file"),
        (["nowhere.yaml"], "nowhere.yaml can't be read"),
        (["FILE", "--alfa", "1"], "alfa: unknown field; did you mean alpha?"),
        (["FILE", "--sweep", "alpha"], "write --sweep FIELD=V1,V2,…"),
        (["FILE", "--sweep", "alpha=-1,1"], "alpha=-1: must be at least 0"),
        (["FILE", "--seeds", "0"], "--seeds 0: must be at least 1"),
        (["FILE", "--sweep", "alpha=0,1", "--sweep", "alpha=2"], "--sweep alpha is given twice"),
        (["FILE", "--out", "FILE"], "small.yaml: File exists; name a folder"),
    ],
)
def test_a_mistake_is_told_before_anything_is_simulated(scenario, arguments, message, capsys):
    words = [str(scenario) if word == "FILE" else word for word in arguments]
    assert cli.run(["simulate", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_full_disk_ends_in_one_line(scenario, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").symlink_to("/dev/full")
    assert cli.run(["simulate", str(scenario), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("flash: OSError: [Errno 28] No space left on device: make room on that")
    assert error.count("\n") == 1


def test_help_lists_the_fields_and_what_can_vary(capsys):
    assert cli.run(["simulate", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--workers.kv_tokens int" in text
    assert "--rollout.max_attempts int" in text
    assert "--workload.turns number|{kind: …}" in text
    assert "workload.turns.sigma" not in text
    assert "rollout.on_stall " not in text, "it is refused"
    assert "rollout.adaptive_alpha" not in text
