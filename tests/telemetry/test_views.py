"""What a run shows: plain lines, the dashboard, the report; also where numbers are unknown."""

import io
import json
import logging
import math
import struct

import pytest
from matplotlib.text import Text
from rich.console import Console

from flash.telemetry.live import OfSet, Snapshot, dashboard, open_view, sparkline
from flash.telemetry.metrics import METRICS
from flash.telemetry.report import draw, write_report

NAN = math.nan


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


SETS = {
    "own": OfSet(
        success_rate=0.61, reward_mean=0.58, held_out=0.33, running=70, ready=95, ages={0: 80},
        staleness_mean=0.5, staleness_max=1,
    ),
    "web": OfSet(
        success_rate=None, reward_mean=NAN, held_out=None, running=20, ready=5, ages={},
        staleness_mean=None, staleness_max=None,
    ),
}  # fmt: skip


def test_task_sets_are_shown_one_by_one(capsys):
    with open_view() as view:
        view.step(snapshot(task_sets=SETS))
    assert "success 42.0%  (own 61.0%, web -)  held-out" in capsys.readouterr().out
    console = Console(record=True, width=140)
    console.print(dashboard(snapshot(task_sets=SETS)))
    lines = console.export_text().splitlines()
    rows = {words[1]: words[2:-1] for words in (line.split() for line in lines) if len(words) > 2}
    assert rows["own"] == ["61.0%", "33.0%", "0.58", "70", "95", "0:", "80", "0.50,", "max", "1"]
    assert rows["web"] == ["-", "-", "-", "20", "5", "-", "-,", "max", "-"]


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


def test_the_logging_is_given_back_after_an_error_too():
    before = logging.getLogger().handlers[:]
    console = Console(force_terminal=True, record=True, width=120)
    with pytest.raises(KeyError), open_view(console):
        raise KeyError("a run that ended")
    assert logging.getLogger().handlers == before


def test_log_lines_appear_above_the_dashboard_not_in_it():
    console = Console(force_terminal=True, record=True, width=120)
    with open_view(console) as view:
        view.step(snapshot())
        logging.getLogger("flash.test").warning("worker 1 is back")
        view.tick(snapshot())
    text = console.export_text()
    assert text.index("worker 1 is back") < text.rindex("step 7 of 40")


def test_progress_without_a_terminal_is_said_at_the_start_and_the_end_not_each_time(capsys):
    with open_view() as view:
        for done in range(1, 1001):
            view.progress("demonstrations", done, 1000, {})
    said = capsys.readouterr().out.splitlines()
    assert (said[0], said[-1]) == ("demonstrations: 1 of 1000", "demonstrations: 1000 of 1000")
    assert len(said) < 10


def test_a_sparkline_rises_with_its_values():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([]) == ""
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert len(sparkline([1.0] * 500)) < 60


def shown(*, terminal: bool, plain: bool | None = None, **changes) -> str:
    """What a step and a line look like."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=140, record=True)
    with open_view(console, plain=plain) as view:
        view.step(snapshot(**changes))
        view.say("the policy [/of 8 layers] is warm")
    return console.export_text()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"success_rate": NAN, "success_rates": (NAN, 0.2)}, id="success nan"),
        pytest.param({"success_rate": None, "success_rates": (None, 0.2)}, id="success None"),
        pytest.param({"eval_success_rates": (NAN,)}, id="evaluation nan"),
        pytest.param({"eval_success_rates": (None,)}, id="evaluation None"),
        pytest.param({"idle": {"trainer": NAN}}, id="idle nan"),
        pytest.param({"time_s": NAN}, id="time nan"),
        pytest.param({"tokens_per_s": NAN, "staleness_max": NAN}, id="speed and age nan"),
    ],
)
def test_an_unknown_number_never_ends_a_run_and_is_shown_as_a_dash(terminal, changes):
    text = shown(terminal=terminal, **changes)
    assert "nan" not in text and "None" not in text
    assert "40" in text and "90" in text


@pytest.mark.parametrize("terminal", [True, False])
def test_brackets_are_text_not_markup(terminal):
    text = shown(terminal=terminal, outcomes={"failed(env [/x])": 1})
    assert "the policy [/of 8 layers] is warm" in text
    assert ("failed(env [/x]) 1" in text) == terminal


def test_plain_lines_can_be_asked_for_in_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    with open_view(console, plain=True) as view:
        view.tick(snapshot())
        view.step(snapshot())
    (line,) = console.file.getvalue().splitlines()
    assert line.startswith("step    7/40") and "\x1b" not in line


def test_brackets_in_the_name_of_a_phase_are_text():
    console = Console(file=io.StringIO(), force_terminal=True, width=140, record=True)
    with open_view(console) as view:
        view.progress("loading [/tmp]", 1, 1, {})
    assert "loading [/tmp]" in console.export_text()


def test_the_cursor_comes_back_after_an_error():
    console = Console(file=io.StringIO(), force_terminal=True, width=140)
    with pytest.raises(KeyError), open_view(console) as view:
        view.step(snapshot())
        raise KeyError("a run that ended")
    written = console.file.getvalue()
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l")


def test_a_sparkline_leaves_out_what_is_not_known():
    assert sparkline([NAN, 0.5, 1.0]) == "▅█"


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
OF_SETS = ("success_rate", "reward/mean", "staleness/mean", "eval/success_rate")
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
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert width > 1000 and height > 600


def test_a_report_is_drawn_where_numbers_are_not_known(tmp_path):
    lines = [json.dumps(dict.fromkeys(METRICS) | {"step": n, "time_s": 1.0 * n}) for n in range(3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    shown = texts(tmp_path)
    assert "success rate by step" in shown
    assert "what became of 0 episodes" in shown


def test_a_report_counts_ages_and_outcomes_over_all_steps(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines_of_a_run(10))))
    counts = [("trained", "", 1234), ("cancelled", "stale", 20), ("failed", "env", 1)]
    episodes = [{"outcome": o, "reason": r} for o, r, number in counts for _ in range(number)]
    (tmp_path / "episodes.jsonl").write_text("\n".join(map(json.dumps, episodes)))
    shown = texts(tmp_path)
    assert {"30.0%", "70.0%", "what became of 1,255 episodes"} <= set(shown)
    assert {"trained", "cancelled\n(stale)", "failed\n(env)", "1,234", "20", "1"} <= set(shown)
    assert {"trainer: mean 25%", "workers: mean 2%"} <= set(shown)
    assert not any("env hosts" in text for text in shown)


def texts(run):
    """All that is written in the picture."""
    figure = draw(run)
    figure.draw_without_rendering()  # labels of ticks are made only then
    return [text.get_text() for text in figure.findobj(Text)]


def test_a_report_of_a_run_with_task_sets_has_a_row_of_them(tmp_path):
    lines = [
        line | {f"{metric}/{name}": 0.5 for metric in OF_SETS for name in ("own", "web")}
        for line in lines_of_a_run(5)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    episodes = [episode | {"task_set": "web"} for episode in EPISODES]
    (tmp_path / "episodes.jsonl").write_text("\n".join(map(json.dumps, episodes)))
    axes = {axis.get_title(): axis for axis in draw(tmp_path).axes}
    for what in ("success rate", "mean reward", "mean age of trained tokens"):
        curves = axes[f"{what} by task set"].get_lines()
        assert {"own", "web"} <= {curve.get_label() for curve in curves}
    bars = axes["episodes by task set"].patches
    assert sum(bar.get_width() for bar in bars) == len(EPISODES)
    assert not any("by task set" in text for text in texts_of(tmp_path / "none", lines_of_a_run(5)))


def texts_of(run, lines):
    run.mkdir()
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return texts(run)


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
