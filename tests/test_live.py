"""The views of runs whose numbers are partly unknown, and what is said beside them."""

import io
import math

import pytest
from rich.console import Console

from flash.live import Snapshot, open_view, sparkline

NAN = math.nan


def snapshot(**changes) -> Snapshot:
    fields = {
        "step": 7, "steps": 40, "policy_version": 7, "time_s": 83.0, "success_rate": 0.42,
        "reward_mean": 0.37, "success_rates": (0.2, 0.42), "eval_success_rates": (0.25, 0.31),
        "running": 90, "ready": 100, "capacity": 256, "ages": {0: 100, 1: 91},
        "tokens_per_s": 1234.0, "idle": {"trainer": 0.3, "workers": 0.05, "env_hosts": None},
        "staleness_mean": 0.81, "staleness_max": 1, "waste_share": 0.03,
        "outcomes": {"trained": 512},
    }  # fmt: skip
    return Snapshot(**(fields | changes))


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
