"""What a run shows: plain lines, the dashboard, the report."""

import json
import logging

import pytest
from matplotlib.text import Text
from rich.console import Console

from flash.live import Snapshot, dashboard, open_view, sparkline
from flash.report import draw, write_report


def snapshot(**changes) -> Snapshot:
    fields = {
        "step": 7, "steps": 40, "policy_version": 7, "time_s": 83.0, "success_rate": 0.42,
        "reward_mean": 0.37, "success_rates": (0.2, 0.42), "eval_success_rates": (0.25, 0.31),
        "running": 90, "ready": 100, "capacity": 256, "ages": {0: 100, 1: 91},
        "tokens_per_s": 1234.0, "idle": {"trainer": 0.3, "workers": 0.05, "env_hosts": None},
        "staleness_mean": 0.81, "staleness_max": 1, "waste_share": 0.03,
        "outcomes": {"trained": 512, "cancelled(stale)": 20},
    }  # fmt: skip
    return Snapshot(**(fields | changes))


def unknown() -> Snapshot:
    return snapshot(
        step=0, success_rate=None, reward_mean=None, success_rates=(), eval_success_rates=(),
        ages={}, tokens_per_s=None, idle={"trainer": None, "workers": None, "env_hosts": None},
        staleness_mean=None, staleness_max=None, outcomes={},
    )  # fmt: skip


def test_without_a_terminal_each_step_is_one_line_with_its_numbers(capsys):
    with open_view() as view:
        view.progress("supervised steps", 10, 10, {"loss": 1.25})
        view.tick(snapshot())
        view.step(snapshot())
        view.step(unknown())
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "supervised steps: 10 of 10, loss 1.250"
    for part in ("7/40", "42.0%", "31.0%", "0.37", "0.81", "1234 tok/s", "trainer 30%", "1:23"):
        assert part in second
    assert "0/40" in third


def test_the_dashboard_shows_the_same_numbers():
    console = Console(record=True, width=140)
    for moment in (snapshot(), unknown()):
        console.print(dashboard(moment))
    text = console.export_text()
    for part in ("step 7 of 40", "42.0%", "25.0%  →  31.0%", "90 running, 100 ready, of 256",
                 "0: 100  1: 91", "mean 0.81", "1234 tokens/s, 3%", "trainer idle", "30%",
                 "cancelled(stale) 20"):  # fmt: skip
        assert part in text
    assert "env hosts idle" not in text


def test_many_evaluations_stay_on_one_line():
    console = Console(record=True, width=100)
    console.print(dashboard(snapshot(eval_success_rates=tuple(n / 100 for n in range(10, 30)))))
    (line,) = [line for line in console.export_text().splitlines() if "held out" in line]
    assert "10.0%  →  …  →  26.0%  →  27.0%  →  28.0%  →  29.0%" in line


def test_a_terminal_gets_the_dashboard_and_its_logging_back():
    console = Console(force_terminal=True, record=True, width=120)
    before = logging.getLogger().handlers[:]
    with open_view(console) as view:
        view.progress("demonstrations", 1, 2, {})
        view.step(snapshot())
        assert logging.getLogger().handlers != before
    assert logging.getLogger().handlers == before
    assert "step 7 of 40" in console.export_text()


def test_a_sparkline_rises_with_its_values():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert len(sparkline([1.0] * 500)) < 60


def lines_of_a_run(steps: int):
    yield {"step": 0, "time_s": 3.0, "eval/success_rate": 0.2}
    for step in range(1, steps + 1):
        line = {
            "step": step, "time_s": 3.0 + 5 * step, "success_rate": 0.2 + 0.3 * step / steps,
            "reward/mean": 0.2 + 0.3 * step / steps, "staleness/histogram": [30, 70],
            "time/train_s": 3.0, "time/publish_s": 0.2, "time/wait_batch_s": 1.0,
            "idle/trainer": 0.25, "idle/workers": 0.02, "idle/env_hosts": None,
        }  # fmt: skip
        yield line | ({"eval/success_rate": 0.5} if step == steps else {})


EPISODES = [
    {"outcome": "trained", "reason": ""},
    {"outcome": "cancelled", "reason": "stale"},
    {"outcome": "failed", "reason": "env"},
]
SUMMARY = {"env": "alfworld", "alpha": 1.0, "seed": 0, "steps": 40, "time_s": 300.0}


@pytest.mark.parametrize("steps", [40, 1, 0])
@pytest.mark.parametrize("whole", [True, False])
def test_a_report_is_drawn_from_whatever_the_folder_holds(tmp_path, steps, whole):
    lines = [json.dumps(line) for line in lines_of_a_run(steps)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    if whole:
        text = "\n".join(json.dumps(episode) for episode in EPISODES)
        (tmp_path / "episodes.jsonl").write_text(text)
        (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    path = write_report(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 20_000


def texts(run):
    """All that is written in the picture."""
    figure = draw(run)
    return [text.get_text() for text in figure.findobj(Text)]


def test_a_report_says_in_its_title_what_came_out_and_counts_every_second(tmp_path):
    lines = [line | {"eval/time_s": 6.0} for line in lines_of_a_run(10)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert any("not ended, 11 lines so far" in text for text in texts(tmp_path))
    summary = SUMMARY | {"eval_success_rate_first": 0.2, "eval_success_rate_last": 0.5}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    shown = texts(tmp_path)
    assert any("held-out success 20% → 50% (+30 points)" in text for text in shown)
    assert "train: 30 s, 29%" in shown
    assert "evaluate: 60 s, 59%" in shown
    assert "wait for a batch: 10 s, 10%" in shown


def test_a_reward_that_is_not_the_success_rate_has_its_own_curve(tmp_path):
    lines = list(lines_of_a_run(10))
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "success rate, which is the mean reward, by step" in texts(tmp_path)
    lines = [line | {"reward/mean": -7.0} if "reward/mean" in line else line for line in lines]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert "success rate and mean reward by step" in texts(tmp_path)
