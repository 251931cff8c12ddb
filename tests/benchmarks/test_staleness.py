"""benchmarks/staleness.py: what it runs, what it leaves out, and that a cell is what it says."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import staleness
from study.cell import Cell, Job, aged
from study.sorting import SortingEnv

from flash.fakes import fake_sample
from flash.types import Batch, Task
from flash.warm_start.small_policy import create


def planted(folder: Path, cell, job, *, final: float, rewards=(0.0,) * 12) -> None:
    """A cell's file, as a run would have left it."""
    steps = [
        {"step": i, "time_s": i, "samples": 8 * i, "reward": reward, "age/mean": 1.0, "alpha": 1.0,
         "importance/ess": 0.5, "kl_behaviour": 0.1, "weight/p01": 0.2, "weight/p99": 2.0,
         "ratio/clip_fraction": 0.0}
        for i, reward in enumerate(rewards)
    ]  # fmt: skip
    result = {"cell": asdict(cell), "job": asdict(job), "final": final, "wasted_tokens": 0}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{cell.name}.json").write_text(json.dumps({**result, "steps": steps}))


def test_a_study_that_was_stopped_goes_on_with_what_is_missing(tmp_path: Path):
    cells = list(staleness.grid(["forced"], ["vanilla", "tis"], [0, 8], 2))
    for done in cells[:5]:
        planted(tmp_path, done, Job(), final=0.5)
    assert staleness.missing(cells, Job(), tmp_path) == cells[5:]


def test_cells_of_another_job_do_not_count(tmp_path: Path):
    (cell,) = staleness.grid(["forced"], ["vanilla"], [0], 1)
    planted(tmp_path, cell, Job(steps=2), final=0.5)
    assert staleness.missing([cell], Job(steps=2), tmp_path) == []
    assert staleness.missing([cell], Job(), tmp_path) == [cell]


def test_a_finished_study_runs_nothing_and_reports(tmp_path: Path):
    for seed, final in enumerate((0.4, 0.5, 0.6)):
        cell = Cell(mode="forced", arm="vanilla", alpha=8, seed=seed)
        planted(tmp_path / "cells", cell, Job(), final=final)
    picture = tmp_path / "picture.png"
    staleness.main(
        ["--arms", "vanilla", "--alphas", "8", "--folder", str(tmp_path), "--picture", str(picture)]
    )
    (row,) = json.loads((tmp_path / "summary.json").read_text())
    assert (row["mode"], row["arm"], row["alpha"], row["seeds"]) == ("forced", "vanilla", 8, 3)
    assert row["final"] == pytest.approx(0.5)
    # 0.1 / sqrt(3) times Student's t with two degrees of freedom.
    assert row["final_interval"] == pytest.approx(4.30 * 0.1 / 3**0.5)
    assert picture.stat().st_size > 10_000


def test_a_mode_that_there_is_not_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        staleness.main(["--modes", "forced,forecd", "--folder", str(tmp_path)])
    assert "--modes: forecd: give some of forced, natural, adaptive" in capsys.readouterr().err


def test_weights_that_were_published_late_make_tokens_older_and_prompts_no_version():
    sample = fake_sample([5, 6, 7], versions=np.array([-1, 9, 9]))
    (late,) = aged(Batch(samples=[sample], version=9), 4).samples
    assert late.versions.tolist() == [-1, 5, 5]


def test_the_teacher_of_the_study_errs_as_often_as_it_says():
    env = SortingEnv(length=4, mistakes=0.3)
    told = [env.demonstrate(Task(seed))[0].action.split() for seed in range(500)]
    right = [sorted(env.reset(seed=seed)[0].split()) for seed in range(500)]
    wrong = np.mean(
        [a != b for x, y in zip(told, right, strict=True) for a, b in zip(x, y, strict=True)]
    )
    assert wrong == pytest.approx(0.3 * 0.9, abs=0.03)


@pytest.mark.slow
def test_forced_tokens_are_exactly_so_old_and_a_cell_is_the_same_each_time(tmp_path: Path):
    def results(folder: str) -> list[dict]:
        (tmp_path / folder).mkdir()
        for cell in cells:
            staleness.run_and_keep(cell, job=job, model=model, folder=tmp_path / folder)
        assert staleness.missing(cells, job, tmp_path / folder) == []
        return [json.loads((tmp_path / folder / f"{cell.name}.json").read_text()) for cell in cells]

    model = create(tmp_path / "model", SortingEnv().vocabulary(), layers=1, hidden_size=8, heads=1)
    job = Job(steps=2, batch_size=8, group_size=4, eval_tasks=4, learning_rate=1e-2)
    # Its advantages are not 0 where no answer is right.
    cells = [Cell(mode=mode, arm="asymmetric", alpha=1, seed=0) for mode in ("forced", "adaptive")]
    forced, adaptive = results("first")
    assert [step["age/max"] for step in forced["steps"]] == [0, 1]
    # What is of age 0 was sampled by the very weights that are trained; what is older was not.
    assert forced["steps"][0]["mismatch/kl_fresh"] < 1e-9
    assert forced["steps"][1]["mismatch/kl_stale"] > 1e-6
    assert max(step["age/max"] for step in adaptive["steps"]) <= 1
    assert results("again") == [forced, adaptive]
