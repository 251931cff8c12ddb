"""A run's folder: what is written, what survives, what a resume keeps."""

import json
import math
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flash.config import load
from flash.telemetry import METRICS, RunFolder, newest_checkpoint, read_lines

FIXED = """
step policy_version time_s reward/mean success_rate loss grad_norm kl_behaviour
ratio/clip_fraction logprob_gap/max staleness/{mean,max,histogram}
episodes/{admitted,running,ready,trained,dropped,failed,cancelled} waste/{tokens,env_s}
tokens/{prompt,generated,trained} tokens_per_s idle/{trainer,workers,env_hosts}
time/{generate,env,reward,wait_batch,train,publish}_s publish/{count,paused_s}
"""


def config(tmp_path, **changes):
    return load("frozen_lake", {"runs_dir": str(tmp_path), **changes})


def expand(word):
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", word)
    return [match[1] + w + match[3] for w in match[2].split(",")] if match else [word]


def test_the_names_of_the_metrics_are_fixed():
    assert set(METRICS) == {name for word in FIXED.split() for name in expand(word)}
    assert all(METRICS.values())


def test_steps_are_lines_and_tensorboard_events(tmp_path):
    with RunFolder(config(tmp_path)) as folder:
        folder.step({"step": 1, "time_s": 2.0, "loss": 0.5, "logprob_gap/max": math.nan})
        # Flushed at once: a crash here loses nothing.
        (line,) = read_lines(folder.path / "metrics.jsonl")
        assert line == {"step": 1, "time_s": 2.0, "loss": 0.5, "logprob_gap/max": None}
    events = EventAccumulator(str(folder.path)).Reload()
    assert events.Scalars("loss")[0].value == 0.5
    assert load(str(folder.path / "config.yaml")) == folder.config


def test_a_run_never_writes_into_anothers_folder(tmp_path):
    names = []
    for _ in range(3):
        with RunFolder(config(tmp_path)) as folder:
            folder.step({"step": 0, "time_s": 0.0})
            names.append(folder.path.name)
    assert names == ["frozen_lake", "frozen_lake-2", "frozen_lake-3"]


def test_a_resume_takes_the_newest_checkpoint_and_drops_the_lines_after_it(tmp_path):
    with RunFolder(config(tmp_path)) as folder:
        for step in range(5):
            folder.step({"step": step, "time_s": float(step)})
        for version in (2, 3):
            folder.checkpoint(version).mkdir(parents=True)
        (folder.path / "checkpoints" / "step_000009.partial").mkdir()
    assert newest_checkpoint(folder.path) == folder.checkpoint(3)
    with RunFolder(config(tmp_path, **{"checkpoint.resume": True})) as folder:
        assert folder.resume_from == folder.checkpoint(3)
        folder.forget_after(3)
        folder.step({"step": 4, "time_s": 9.0})
    assert [line["step"] for line in folder.metrics()] == [0, 1, 2, 3, 4]
    assert folder.metrics()[-1]["time_s"] == 9.0


def test_a_resume_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        RunFolder(config(tmp_path, **{"checkpoint.resume": True}))


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1}]
