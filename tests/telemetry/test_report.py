"""The report of runs whose numbers are partly unknown, and the stages of their episodes."""

import json
import math
import subprocess
import sys

import pytest
from matplotlib.text import Text

from flash.telemetry.report import draw, write_report

STEP = {
    "step": 1, "time_s": 5.0, "success_rate": 0.3, "reward/mean": 0.3, "time/train_s": 1.0,
    "staleness/histogram": [1, 3], "idle/trainer": 0.3,
}  # fmt: skip


def folder(tmp_path, lines, episodes=()):
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "episodes.jsonl").write_text("\n".join(map(json.dumps, episodes)))
    return tmp_path


def texts(run):
    """All that is written in the picture."""
    figure = draw(run)
    figure.draw_without_rendering()  # labels of ticks are made only then
    return [text.get_text() for text in figure.findobj(Text)]


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param([{"step": 1} | {name: math.nan for name in STEP if name[0] != "s"}], id="nan"),
        pytest.param([STEP, STEP | {"time_s": None, "step": 2}], id="a line without its time"),
        pytest.param([{"step": 1, "success_rate": 0.3}], id="no time at all"),
        pytest.param([STEP | {"staleness/histogram": [None, 3]}], id="an unknown count"),
        pytest.param([STEP | {"idle/trainer": math.nan}], id="an unknown share"),
        pytest.param([{"step": 0, "time_s": 1.0, "eval/success_rate": 0.1}], id="the start alone"),
    ],
)
def test_what_is_not_known_is_left_out_of_the_picture(tmp_path, lines):
    path = write_report(folder(tmp_path, lines))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not any("nan" in text for text in texts(tmp_path))


def test_an_empty_folder_has_a_report(tmp_path):
    assert write_report(tmp_path).stat().st_size > 20_000


def test_the_stages_are_means_over_trained_episodes_only(tmp_path):
    stages = [{"generate": 2.0, "env": 0.01, "wait": 1.0}, {"generate": 4.0, "env": 0.03}]
    episodes = [{"outcome": "trained", "reason": "", "stages_s": stage} for stage in stages]
    episodes.append({"outcome": "failed", "reason": "env", "stages_s": {"generate": 900.0}})
    shown = texts(folder(tmp_path, [STEP], episodes))
    assert {"generate", "3.0 s", "environment", "20 ms", "wait to be trained", "500 ms"} <= set(
        shown
    )


def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, flash.telemetry.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
