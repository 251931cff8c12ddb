"""report.png: a run on one page, drawn from the files of its folder alone."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flash.telemetry import read_lines

Line = Mapping[str, Any]

_TRAIN, _HELDOUT, _GREY = "#4c72b0", "#c44e52", "#8c8c8c"
_STAGES = {
    "time/train_s": ("train", "#4c72b0"),
    "time/publish_s": ("publish", "#dd8452"),
    "time/wait_batch_s": ("wait for a batch", "#d5d5d5"),
}
_OUTCOMES = {
    "trained": "#55a868",
    "dropped": "#dd8452",
    "cancelled": "#ccb974",
    "failed": "#c44e52",
}
_SMOOTH = 5


def write_report(run: Path) -> Path:
    """Draws `run/report.png`; takes seconds, so not in an event loop."""
    # Slow to import, and only the end of a run needs it; no pyplot, which keeps global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    lines = read_lines(run / "metrics.jsonl")
    episodes = read_lines(run / "episodes.jsonl")
    figure = Figure(figsize=(14, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(run), fontsize=11, x=0.01, ha="left")
    axes = figure.subplots(2, 3)
    _curves(axes[0, 0], lines, "step", "step", lambda line: line["step"])
    _curves(axes[0, 1], lines, "minutes", "wall-clock", lambda line: line["time_s"] / 60)
    _staleness(axes[0, 2], lines)
    _where_time_went(axes[1, 0], lines)
    _idle(axes[1, 1], lines)
    _outcomes(axes[1, 2], episodes)
    path = run / "report.png"
    figure.savefig(path, dpi=110)
    return path


def _curves(
    axis: Any, lines: Sequence[Line], unit: str, by: str, x: Callable[[Line], float]
) -> None:
    trained = [line for line in lines if line.get("success_rate") is not None]
    xs = [x(line) for line in trained]
    rates = [100 * line["success_rate"] for line in trained]
    axis.plot(xs, rates, color=_TRAIN, alpha=0.25, lw=1)
    axis.plot(xs, _smooth(rates), color=_TRAIN, lw=2, label=f"training (mean of {_SMOOTH})")
    rewards = [100 * line["reward/mean"] for line in trained]
    if any(abs(a - b) > 1e-6 for a, b in zip(rates, rewards, strict=True)):
        axis.plot(xs, _smooth(rewards), color=_GREY, lw=1.5, ls="--", label="reward × 100")
    evaluated = [line for line in lines if line.get("eval/success_rate") is not None]
    exs = [x(line) for line in evaluated]
    scores = [100 * line["eval/success_rate"] for line in evaluated]
    axis.plot(exs, scores, "o-", color=_HELDOUT, lw=1.5, label="held out")
    for number in {0, len(scores) - 1} if scores else ():
        axis.annotate(
            f"{scores[number]:.0f}%", (exs[number], scores[number]), xytext=(0, 8),
            textcoords="offset points", ha="center", color=_HELDOUT, fontweight="bold",
        )  # fmt: skip
    axis.set(title=f"success rate by {by}", xlabel=unit, ylabel="%", ylim=(0, 105))
    axis.grid(alpha=0.25)
    axis.legend(loc="lower right", fontsize=8)


def _staleness(axis: Any, lines: Sequence[Line]) -> None:
    totals: Counter[int] = Counter()
    for line in lines:
        totals.update(dict(enumerate(line.get("staleness/histogram") or [])))
    everything = max(1, totals.total())
    ages = range(max(totals, default=0) + 1)
    shares = [100 * totals[age] / everything for age in ages]
    bars = axis.bar([str(age) for age in ages], shares, color=_TRAIN)
    axis.bar_label(bars, fmt="%.0f%%", fontsize=9)
    axis.set(
        title="staleness of trained tokens", xlabel="versions old", ylabel="% of tokens",
        ylim=(0, 110),
    )  # fmt: skip


def _where_time_went(axis: Any, lines: Sequence[Line]) -> None:
    steps = [line for line in lines if line.get("time/train_s") is not None]
    bottom = [0.0] * len(steps)
    for name, (label, color) in _STAGES.items():
        seconds = [line.get(name) or 0.0 for line in steps]
        total = sum(seconds)
        axis.bar(
            [line["step"] for line in steps], seconds, bottom=bottom, width=1.0, color=color,
            label=f"{label}: {total:.0f} s",
        )  # fmt: skip
        bottom = [a + b for a, b in zip(bottom, seconds, strict=True)]
    axis.set(title="where the trainer's time went", xlabel="step", ylabel="s")
    axis.legend(fontsize=8)


def _idle(axis: Any, lines: Sequence[Line]) -> None:
    for role, color in (("trainer", _TRAIN), ("workers", _HELDOUT), ("env_hosts", "#55a868")):
        known = [line for line in lines if line.get(f"idle/{role}") is not None]
        shares = [100 * line[f"idle/{role}"] for line in known]
        if shares:
            label = f"{role.replace('_', ' ')}: {sum(shares) / len(shares):.0f}% on average"
            axis.plot([line["step"] for line in known], _smooth(shares), color=color, label=label)
    axis.set(title="idle share of each role", xlabel="step", ylabel="%", ylim=(-2, 102))
    axis.grid(alpha=0.25)
    if axis.lines:
        axis.legend(fontsize=8)


def _outcomes(axis: Any, episodes: Sequence[Line]) -> None:
    counts = Counter((episode["outcome"], episode["reason"]) for episode in episodes)
    rows = sorted(counts.items(), key=lambda item: item[1])[-8:]
    names = [f"{outcome} ({reason})" if reason else outcome for (outcome, reason), _ in rows]
    bars = axis.barh(
        names, [n for _, n in rows], color=[_OUTCOMES[outcome] for (outcome, _), _ in rows]
    )
    axis.bar_label(bars, fontsize=9, padding=3)
    axis.margins(x=0.15)
    axis.set(title="what became of the episodes", xlabel="episodes")


def _title(run: Path) -> str:
    path = run / "summary.json"
    if not path.exists():
        return run.name
    summary = json.loads(path.read_text())
    return (
        f"{run.name}: {summary['env']}, alpha {summary['alpha']:g}, seed {summary['seed']}, "
        f"{summary['steps']} steps in {summary['time_s'] / 60:.1f} minutes"
    )


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of the last few values."""
    windows = [values[max(0, end - _SMOOTH) : end] for end in range(1, len(values) + 1)]
    return [math.fsum(window) / len(window) for window in windows]
