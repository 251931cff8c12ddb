"""A run's folder: what is written, what survives, what a resume keeps."""

import asyncio
import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flash.config import load
from flash.errors import InferenceFailure
from flash.evaluation.result import Evaluation
from flash.log.past import Past
from flash.log.run_log import ID_FILE
from flash.rollout.record import EpisodeRecord
from flash.section import revealed
from flash.system.durable import LOCK_FILE, HeldError, locked
from flash.telemetry.folder import TRANSCRIPTS_FILE, RunFolder, read_lines
from flash.telemetry.metrics import METRICS, MORE_METRICS
from tests.saved import fake_checkpoint

FIXED = """
step policy_version time_s reward/mean success_rate loss grad_norm kl_behaviour
ratio/clip_fraction logprob_gap/max staleness/{mean,max,histogram}
episodes/{admitted,running,ready,trained,reused,dropped,failed,cancelled} waste/{tokens,env_s}
tokens/{prompt,generated,mixed,trained} tokens_per_s idle/{trainer,workers,env_hosts}
time/{generate,env,tools,agent,reward,wait_batch,train,publish}_s
publish/{count,paused_s,load_s,reset_s}
log/lag_s trainer/restarts
bias/{turns,tokens,seconds}
"""


def config(tmp_path, **changes):
    return load("frozen_lake", {"runs_dir": str(tmp_path), **changes})


def expand(word):
    match = re.fullmatch(r"(.*)\{(.*)\}(.*)", word)
    return [match[1] + w + match[3] for w in match[2].split(",")] if match else [word]


def test_what_the_watchdog_says_is_kept_in_the_runs_folder(tmp_path):
    with RunFolder(config(tmp_path)) as folder:
        folder.stalled("the reward hangs [reward_hangs]")
        folder.stalled("and again")
    kept = (folder.path / "logs" / "stalls.log").read_text()
    assert re.findall(r"^[\d-]+ [\d:]+ (.*)", kept, re.MULTILINE) == [
        "the reward hangs [reward_hangs]",
        "and again",
    ]


def test_a_folder_that_is_removed_under_the_run_is_what_the_run_ends_with(tmp_path):
    def removed():
        with RunFolder(config(tmp_path)) as folder:
            shutil.rmtree(folder.path)
            folder.summary({})

    with pytest.raises(FileNotFoundError, match=r"summary\.json"):
        removed()


@pytest.mark.parametrize("how", ["removed", "moved", "replaced by another's"])
def test_a_run_ends_at_its_next_step_once_its_folder_is_not_in_its_place(how, tmp_path):
    def ended():
        with RunFolder(config(tmp_path)) as folder:
            folder.measured({"step": 1, "time_s": 1.0})
            folder.path.rename(tmp_path / "elsewhere")
            if how == "removed":
                shutil.rmtree(tmp_path / "elsewhere")
            if how == "replaced by another's":
                folder.path.mkdir()
            folder.measured({"step": 2, "time_s": 2.0})

    with pytest.raises(FileNotFoundError, match=r"removed or moved; leave .*: '.*frozen_lake'"):
        ended()
    if how != "removed":
        assert [line["step"] for line in read_lines(tmp_path / "elsewhere/metrics.jsonl")] == [1]


def test_a_run_that_was_moved_while_it_runs_is_not_resumed_under_its_new_name(tmp_path):
    with RunFolder(config(tmp_path)) as folder:
        save(folder, 1)
        folder.path.rename(tmp_path / "moved")
        resume = config(tmp_path, name="moved", **{"checkpoint.resume": True})
        with pytest.raises(ValueError, match=f"moved still runs, in process {os.getpid()}"):
            RunFolder(resume).__enter__()
        (tmp_path / "moved").rename(folder.path)
    folder.path.rename(tmp_path / "moved")
    with RunFolder(resume) as again:
        assert again.checkpoint.version == 1


def test_a_folder_that_is_removed_at_the_very_end_is_told_too(tmp_path):
    folder = RunFolder(config(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"), folder:
        shutil.rmtree(folder.path)


def test_lines_that_are_no_objects_or_no_text_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n3\n\xff\xfe\n{"step": 2}\n{"st')
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_the_names_of_the_metrics_are_fixed():
    assert set(METRICS) == {name for word in FIXED.split() for name in expand(word)}
    assert all(METRICS.values())


def test_what_an_evaluation_measures_is_explained():
    evaluation = Evaluation(
        success_rate=0.5,
        reward_mean=0.5,
        turns_mean=9,
        episodes=64,
        failed=0,
        time_s=1,
        versions=(3,),
    )
    assert evaluation.metrics().keys() <= MORE_METRICS.keys()
    assert not METRICS.keys() & MORE_METRICS.keys()
    assert all(MORE_METRICS.values())


def test_steps_are_lines_and_tensorboard_events(tmp_path):
    with RunFolder(config(tmp_path)) as folder:
        folder.measured({"step": 1, "time_s": 2.0, "loss": 0.5, "logprob_gap/max": math.nan})
        # Flushed at once: a crash here loses nothing.
        (line,) = read_lines(folder.path / "metrics.jsonl")
        assert line == {"step": 1, "time_s": 2.0, "loss": 0.5, "logprob_gap/max": None}
    events = EventAccumulator(str(folder.path)).Reload()
    assert events.Scalars("loss")[0].value == 0.5
    assert abs(events.Scalars("loss")[0].wall_time - time.time()) < 60, "a date, not a duration"
    assert load(str(folder.path / "config.yaml")) == folder.config


def test_the_folder_of_a_run_holds_what_its_description_names(tmp_path):
    with RunFolder(config(tmp_path)) as folder:
        folder.measured({"step": 1, "time_s": 2.0})
        folder.ended(None, episode(0))
        folder.summary(
            {"steps": 1, "rate": math.nan, "list": [math.inf, (1.0, math.nan)], "in": {"x": -1}}
        )
        save(folder, 1)
    files = {path.name for path in folder.path.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "episodes.jsonl", "summary.json"} <= files
    assert len([name for name in files if name.startswith("events.out.")]) == 1
    assert (folder.path / "checkpoints" / "step_000001").is_dir()
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary == {"steps": 1, "rate": None, "list": [None, [1.0, None]], "in": {"x": -1}}


def test_no_key_is_in_the_folder_and_a_resume_asks_for_it_again(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sesame-judge")
    judge = {"name": "judge", "url": "http://judge/v1", "model": "m", "api_key": "$JUDGE_KEY"}
    engine = {"urls": ["http://a:1"], "api_key": "sesame-engine"}
    told = config(tmp_path, name="r", reward=judge, engine=engine)
    assert revealed(told.engine.api_key) == "sesame-engine"
    assert revealed(told.reward.api_key) == "sesame-judge"
    assert "sesame" not in repr(told)
    with RunFolder(told):
        pass
    written = tmp_path / "r" / "config.yaml"
    assert "sesame" not in written.read_text()
    with pytest.raises(ValueError, match=r"engine.api_key='\(not kept\)': .* give it again"):
        load(str(written))
    again = load(str(written), {"engine.api_key": "sesame-engine"})
    assert again == told, "the variable is kept by its name"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ValueError, match=r"reward.api_key='\$JUDGE_KEY': .*export it"):
        load(str(written), {"engine.api_key": "sesame-engine"})


def test_a_run_never_writes_into_anothers_folder(tmp_path):
    names = []
    for _ in range(3):
        with RunFolder(config(tmp_path)) as folder:
            folder.measured({"step": 0, "time_s": 0.0})
            names.append(folder.path.name)
    assert names == ["frozen_lake", "frozen_lake-2", "frozen_lake-3"]
    third = load(str(tmp_path / names[2] / "config.yaml"))
    assert third.name == names[2], "so that its own config.yaml resumes it, not the first"


def test_a_run_that_ends_before_its_first_line_gives_its_name_back(tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="no such dataset"), RunFolder(config(tmp_path)):
            raise ValueError("no such dataset")
    with RunFolder(config(tmp_path)) as folder:
        assert folder.path.name == "frozen_lake"


def test_a_run_that_ends_before_its_first_step_keeps_the_lines_of_its_episodes(tmp_path):
    with RunFolder(config(tmp_path)) as folder:
        folder.ended(None, episode(0))
    assert [line["episode"] for line in read_lines(folder.path / "episodes.jsonl")] == [0]


def test_a_run_that_is_killed_before_its_log_begins_gives_its_name_back(tmp_path):
    with RunFolder(config(tmp_path)) as folder:
        shutil.copytree(folder.path, tmp_path / "killed")
    shutil.rmtree(folder.path)
    (tmp_path / "killed").rename(folder.path)
    assert (folder.path / "metrics.jsonl").exists()
    with RunFolder(config(tmp_path)) as folder:
        assert folder.path.name == "frozen_lake"
        (folder.path / ID_FILE).write_text("a")
        with RunFolder(config(tmp_path)) as other:
            assert other.path.name == "frozen_lake-2"


def test_what_ended_a_run_is_in_its_log_and_the_error_says_where(tmp_path):
    with pytest.raises(InferenceFailure) as caught, RunFolder(config(tmp_path)):
        raise InferenceFailure("no worker is left")
    path = tmp_path / "frozen_lake" / "logs" / "controller.log"
    assert caught.value.__notes__ == [f"more in {path}"]
    assert "test_folder.py" in path.read_text()
    assert path.read_text().endswith("no worker is left\n")


def test_a_run_that_is_cancelled_logs_no_error(tmp_path):
    with pytest.raises(asyncio.CancelledError), RunFolder(config(tmp_path)):
        raise asyncio.CancelledError
    assert not (tmp_path / "frozen_lake" / "logs").exists()


def test_a_folder_that_can_not_be_written_is_the_users_to_change(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ValueError, match=r"runs_dir='.*file': .* give a folder to write to"),
        RunFolder(config(tmp_path / "file")),
    ):
        pass


def save(folder, version):
    (folder.path / ID_FILE).write_text("0" * 32)
    return fake_checkpoint(folder.path, version)


def episode(number, trained_at=None, outcome="trained", reason=""):
    return EpisodeRecord(
        episode=number, seed=number, group=0, attempt=1, outcome=outcome, reason=reason, reward=1.0,
        success=True, turns=3, prompt_tokens=30, generated_tokens=9, version_min=0, version_max=0,
        trained_at_version=trained_at, admitted_s=0.0, ended_s=1.0, stages_s={"env": 0.1},
    )  # fmt: skip


def test_a_resume_takes_the_newest_checkpoint_and_drops_the_lines_after_it(tmp_path):
    with RunFolder(config(tmp_path)) as folder:
        for step in range(5):
            folder.measured({"step": step, "time_s": float(step)})
        for version in (2, 3):
            newest = save(folder, version)
    # TensorBoard reads files by name, which begins with the second they were made in.
    (events,) = folder.path.glob("events.*")
    events.rename(folder.path / "events.out.tfevents.0000000001.earlier")
    with RunFolder(config(tmp_path, **{"checkpoint.resume": True})) as folder:
        assert folder.checkpoint.path == newest
        assert not load(str(folder.path / "config.yaml")).checkpoint.resume, "it can start anew"
        folder.go_on(Past(checkpoint=3, steps=[{"step": step} for step in range(4)]))
        folder.measured({"step": 4, "time_s": 9.0})
    assert [line["step"] for line in folder.metrics()] == [0, 1, 2, 3, 4]
    assert [line["time_s"] for line in folder.metrics()] == [0.0, 1.0, 2.0, 3.0, 9.0]
    scalars = EventAccumulator(str(folder.path)).Reload().Scalars("time_s")
    assert [event.step for event in scalars] == [0, 1, 2, 3, 4], "no step twice in TensorBoard"


def test_tensorboard_has_no_step_twice_where_a_clock_was_set_back(tmp_path):
    steps = [{"step": step, "time_s": float(step)} for step in range(5)]
    with RunFolder(config(tmp_path)) as folder:
        for line in steps:
            folder.measured(line)
        save(folder, 3)
    (events,) = folder.path.glob("events.*")
    events.rename(folder.path / f"events.out.tfevents.{int(time.time()) + 86_400}.earlier.1")
    with RunFolder(config(tmp_path, **{"checkpoint.resume": True})) as folder:
        folder.go_on(Past(checkpoint=3, steps=steps[:4]))
        folder.measured({"step": 4, "time_s": 9.0})
    scalars = EventAccumulator(str(folder.path)).Reload().Scalars("time_s")
    assert [(event.step, event.value) for event in scalars][3:] == [(3, 3.0), (4, 9.0)]


def test_a_resume_makes_the_lines_those_of_the_log(tmp_path):
    of_log = [episode(0, trained_at=0), episode(1, outcome="dropped"), episode(2, trained_at=1)]
    with RunFolder(config(tmp_path)) as folder:
        for record in (of_log[0], of_log[1], episode(3, outcome="cancelled")):
            folder.ended(None, record)
        folder.measured({"step": 1, "time_s": 1.0})
        for step in (1, 2, 3):
            folder.transcript({"step": step})
        save(folder, 1)
    steps = [{"step": 1, "time_s": 1.0}, {"step": 2, "time_s": 2.0}]
    with RunFolder(config(tmp_path, **{"checkpoint.resume": True})) as folder:
        folder.go_on(Past(checkpoint=1, redo=[1], steps=steps, records=of_log))
        folder.ended(None, episode(4, trained_at=1))
    lines = read_lines(folder.path / "episodes.jsonl")
    assert [line["episode"] for line in lines] == [0, 1, 2, 4], "what did not end is left out"
    assert lines[0]["stages_s"] == {"env": 0.1}
    assert lines[2]["trained_at_version"] == 1, "what a crash had kept from the file is there"
    assert folder.metrics() == steps
    assert [line["step"] for line in read_lines(folder.path / TRANSCRIPTS_FILE)] == [1, 2]


def test_the_lines_of_a_clean_stop_give_way_to_what_became_of_its_episodes(tmp_path):
    stopped = episode(0, outcome="dropped", reason="shutdown")
    with RunFolder(config(tmp_path)) as folder:
        folder.ended(None, stopped)
        folder.ended(None, episode(1, trained_at=0))
        folder.measured({"step": 1, "time_s": 1.0})
        save(folder, 1)
    since = [episode(0, trained_at=1), episode(1, outcome="dropped", reason="abandoned")]
    with RunFolder(config(tmp_path, **{"checkpoint.resume": True})) as folder:
        folder.go_on(Past(checkpoint=1, records=since))
    lines = read_lines(folder.path / "episodes.jsonl")
    assert [(line["episode"], line["outcome"], line["reason"]) for line in lines] == [
        (0, "trained", ""),
        (1, "dropped", "abandoned"),
    ]


def test_a_run_of_which_no_checkpoint_is_whole_goes_on_from_its_log_alone(tmp_path, caplog):
    with RunFolder(config(tmp_path)) as folder:
        folder.measured({"step": 1, "time_s": 1.0})
        (save(folder, 1) / "policy/.metadata").unlink()
    with RunFolder(config(tmp_path, **{"checkpoint.resume": True})) as folder:
        assert (folder.checkpoint, folder.version) == (None, 0)
    assert "policy/.metadata is missing" in caplog.text


@pytest.mark.parametrize("spoiled", [b'{"step": 2, "ti', b'{"st\n', b"\0" * 9 + b"\n", b"\xff\n"])
def test_a_resume_after_a_crash_in_mid_line_writes_no_line_into_another(tmp_path, spoiled):
    with RunFolder(config(tmp_path)) as folder:
        folder.measured({"step": 1, "time_s": 1.0})
        save(folder, 1)
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(spoiled)
    with RunFolder(config(tmp_path, **{"checkpoint.resume": True})) as folder:
        folder.measured({"step": 2, "time_s": 2.0})
    text = (folder.path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2]


def test_a_resume_without_a_checkpoint_is_refused(tmp_path):
    for _ in range(2):
        with (
            pytest.raises(ValueError, match="holds no run with a log"),
            RunFolder(config(tmp_path, **{"checkpoint.resume": True})),
        ):
            pass
        (tmp_path / "frozen_lake").mkdir(exist_ok=True)


def test_a_run_that_is_still_going_is_not_resumed_and_its_files_stay_as_they_are(tmp_path):
    resume = config(tmp_path, **{"checkpoint.resume": True})
    with RunFolder(config(tmp_path)) as folder:
        for step in range(3):
            folder.measured({"step": step, "time_s": float(step)})
        save(folder, 1)
        before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
        with (
            pytest.raises(ValueError, match=rf"still runs, in process {os.getpid()}: stop that"),
            RunFolder(resume),
        ):
            pass
        after = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
        assert after == before
        with RunFolder(config(tmp_path)) as other:
            assert other.path.name == "frozen_lake-2"
    with RunFolder(resume) as folder:
        assert folder.checkpoint.version == 1


def test_a_run_whose_process_was_killed_is_resumed_at_once(tmp_path):
    with RunFolder(config(tmp_path)) as folder:
        save(folder, 1)
    code = (
        "import os, signal; from pathlib import Path; from flash.system.durable import locked\n"
        f"with locked(Path({str(folder.path)!r})): os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (folder.path / LOCK_FILE).read_text().isdigit(), "as it died"
    with RunFolder(config(tmp_path, **{"checkpoint.resume": True})) as folder:
        assert (folder.path / LOCK_FILE).read_text() == str(os.getpid())
    assert not (folder.path / LOCK_FILE).read_text(), "nobody is named who has ended"


def test_of_resumes_at_the_same_moment_one_goes_on_and_the_others_are_refused(tmp_path):
    with RunFolder(config(tmp_path)) as folder:
        save(folder, 1)
    resume = config(tmp_path, **{"checkpoint.resume": True})
    opened, refused = _at_the_same_moment(8, lambda: RunFolder(resume))
    assert len(opened) == 1
    assert all("still runs, in process" in str(error) for error in refused)


def test_of_runs_that_begin_at_the_same_moment_each_has_a_folder_of_its_own(tmp_path):
    opened, refused = _at_the_same_moment(8, lambda: RunFolder(config(tmp_path)))
    assert not refused
    assert len({folder.path for folder in opened}) == 8


def _at_the_same_moment(number, make):
    """The folders that could be opened, closed again, and what the others raised."""
    start, end = threading.Barrier(number), threading.Barrier(number)
    opened, refused = [], []

    def enter():
        with contextlib.ExitStack() as stack:
            start.wait(20)
            try:
                opened.append(stack.enter_context(make()))
            except ValueError as error:
                refused.append(error)
            end.wait(20)

    with ThreadPoolExecutor(number) as threads:
        for done in [threads.submit(enter) for _ in range(number)]:
            done.result()
    return opened, refused


def test_a_holder_that_is_not_known_yet_is_not_named(tmp_path):
    resume = config(tmp_path, **{"checkpoint.resume": True})
    with RunFolder(config(tmp_path)) as folder:
        (folder.path / LOCK_FILE).write_text("")
        with pytest.raises(ValueError, match="runs, in process unknown: stop it first, or start"):
            RunFolder(resume).__enter__()


def test_a_run_in_a_folder_that_can_not_be_written_is_not_resumed(tmp_path, unprivileged):
    with unprivileged(tmp_path) as runs:
        with RunFolder(config(runs)) as folder:
            save(folder, 1)
        folder.path.chmod(0o555)
        (folder.path / LOCK_FILE).chmod(0o444)
        with pytest.raises(ValueError, match=r"runs_dir='.*Permission denied.*frozen_lake.*: give"):
            RunFolder(config(runs, **{"checkpoint.resume": True})).__enter__()


@pytest.fixture
def unprivileged():
    """A folder to be in as a user who has no right to everything."""

    @contextlib.contextmanager
    def entered(tmp_path):
        if os.geteuid():
            yield tmp_path
            return
        with tempfile.TemporaryDirectory() as folder:
            os.chown(folder, 65534, -1)
            os.seteuid(65534)
            try:
                yield Path(folder)
            finally:
                os.seteuid(0)

    return entered


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from flash.system.durable import locked\n"
        f"with locked(Path({str(tmp_path)!r})): print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(HeldError, match=f"process {holder.pid}"), locked(tmp_path):
            pass
        holder.kill()
    with locked(tmp_path):
        pass


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seed": 1}, r"seed=1 with checkpoint.resume: the run began with 0.*leave seed as it was"),
        ({"policy.layers": 7}, r"policy.layers=7 .* began with 2"),
        ({"warm_start.steps": 7}, r"warm_start.steps=7 "),
        ({"model": "MODEL"}, r"model='.*' with checkpoint.resume: the run began with 'small'"),
    ],
)
def test_what_a_checkpoint_has_already_can_not_be_changed_by_a_resume(tmp_path, changes, said):
    (tmp_path / "config.json").write_text("{}")
    with RunFolder(config(tmp_path)) as folder:
        save(folder, 1)
    kept = (folder.path / "config.yaml").read_text()
    changes = {
        name: str(tmp_path) if value == "MODEL" else value for name, value in changes.items()
    }
    with (
        pytest.raises(ValueError, match=said),
        RunFolder(config(tmp_path, **{"checkpoint.resume": True}, **changes)),
    ):
        pass
    assert (folder.path / "config.yaml").read_text() == kept


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_a_folder_with_something_of_a_run_is_no_new_runs(tmp_path, name):
    (tmp_path / "frozen_lake" / name).mkdir(parents=True)
    with RunFolder(config(tmp_path)) as folder:
        assert folder.path.name == "frozen_lake-2"


def test_a_resume_from_the_only_folder_keeps_its_name_and_its_settings_are_the_new_ones(tmp_path):
    with RunFolder(config(tmp_path, steps=4)) as folder:
        folder.measured({"step": 1, "time_s": 1.0})
        save(folder, 1)
    with RunFolder(config(tmp_path, steps=9, **{"checkpoint.resume": True})) as folder:
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["frozen_lake"]
    assert load(str(folder.path / "config.yaml")).steps == 9


def test_a_file_that_is_not_there_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "metrics.jsonl") == []


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_lines(path) == [{"step": 1}]
