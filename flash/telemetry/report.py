"""report.png: a run on one page, drawn from the files of its folder alone.

A run that was killed has none; `python -m flash.telemetry.report runs/NAME` draws it.
"""

import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flash.command_line import ended
from flash.telemetry.folder import read_lines

Line = Mapping[str, Any]

_TRAIN, _HELDOUT, _ENVS, _GREY = "#3b6ea8", "#c2443f", "#4f9a63", "#8c8c8c"
_STAGES = {
    "time/train_s": ("train", _TRAIN),
    "time/publish_s": ("publish", "#e08a4e"),
    "eval/time_s": ("evaluate", "#a58bc4"),
    "time/wait_batch_s": ("wait for a batch", "#d9d9d9"),
}
_EPISODE_STAGES = {
    "generate": "generate",
    "env": "environment",
    "tools": "tools",
    "reward": "reward",
    "wait": "wait to be trained",
}
_UPPER = [["by step", "by time", "ages"], ["by step", "by time", "stages"]]
_ROLES = {"trainer": _TRAIN, "workers": _HELDOUT, "env_hosts": _ENVS}
_OUTCOMES = {"trained": _ENVS, "dropped": "#e08a4e", "cancelled": "#cdb45f", "failed": _HELDOUT}
_SMOOTH = 5
_MOST_REASONS = 8


def write_report(run: Path) -> Path:
    """Draws `run/report.png`; takes seconds, so not in an event loop."""
    path = run / "report.png"
    draw(run).savefig(path, dpi=110)
    return path


def draw(run: Path) -> Any:
    """The figure (matplotlib's) of whatever the run's folder holds so far."""
    # Slow to import, and only the end of a run needs it; no pyplot, which keeps global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

    lines = [_known(line) for line in read_lines(run / "metrics.jsonl")]
    episodes = read_lines(run / "episodes.jsonl")
    sets = _task_sets(lines)
    figure = Figure(figsize=(15, 12.2 if sets else 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    # Rows of their own, so that long labels in one do not push the other's columns apart.
    rows: Any = figure.subfigures(3 if sets else 2, 1, hspace=0.03)
    figure.suptitle(_title(run, lines), fontsize=13, x=0.008, ha="left")
    upper = rows[0].subplot_mosaic(_UPPER, height_ratios=(3, 2))
    lower = rows[1].subplots(1, 3)
    _curves(upper["by step"], lines, "step", "step", lambda line: line["step"])
    timed = [line for line in lines if "time_s" in line]
    _curves(upper["by time"], timed, "minutes", "wall-clock", lambda line: line["time_s"] / 60)
    _staleness(upper["ages"], lines)
    _stages(upper["stages"], episodes)
    _where_time_went(lower[0], lines)
    _idle(lower[1], lines)
    _outcomes(lower[2], episodes)
    of_sets: Any = rows[2].subplots(1, 4) if sets else ()
    if sets:
        _of_sets(of_sets[0], lines, sets, "success_rate", title="success rate", percent=True)
        _of_sets(of_sets[1], lines, sets, "reward/mean", title="mean reward")
        _of_sets(of_sets[2], lines, sets, "staleness/mean", title="mean age of trained tokens")
        _outcomes_of_sets(of_sets[3], episodes, sets)
    for axis in (*upper.values(), *lower, *of_sets):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
        axis.title.set_fontsize(11)
        if axis.get_xlabel() == "step":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _curves(
    axis: Any, lines: Sequence[Line], unit: str, by: str, x: Callable[[Line], float]
) -> None:
    trained = [line for line in lines if line.get("success_rate") is not None]
    xs = [x(line) for line in trained]
    rates = [100 * line["success_rate"] for line in trained]
    handles = axis.plot(xs, rates, color=_TRAIN, alpha=0.25, lw=1)
    handles = axis.plot(xs, _smooth(rates), color=_TRAIN, lw=2, label=_smoothed("training"))
    evaluated = [line for line in lines if line.get("eval/success_rate") is not None]
    exs = [x({**line, "step": line.get("eval/version", line["step"])}) for line in evaluated]
    scores = [100 * line["eval/success_rate"] for line in evaluated]
    handles += axis.plot(exs, scores, "o-", color=_HELDOUT, lw=1.5, ms=5, label="held out")
    for number in sorted({0, len(scores) - 1}) if scores else ():
        axis.annotate(
            f"{scores[number]:.0f}%", (exs[number], scores[number]), xytext=(0, 9),
            textcoords="offset points", ha="center", color=_HELDOUT, fontweight="bold",
            bbox={"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8},
        )  # fmt: skip
    rewards = [line.get("reward/mean") for line in trained]
    known = [reward for reward in rewards if reward is not None]
    title = "success rate"
    if len(known) == len(rates) and all(
        math.isclose(100 * reward, rate, abs_tol=1e-6)
        for reward, rate in zip(known, rates, strict=True)
    ):
        title = "success rate, which is the mean reward," if known else title
    elif known:
        title = "success rate and mean reward"
        right = axis.twinx()
        rxs = [x for x, reward in zip(xs, rewards, strict=True) if reward is not None]
        right.plot(rxs, known, color=_GREY, alpha=0.3, lw=1)
        handles += right.plot(rxs, _smooth(known), color=_GREY, ls="--", lw=1.5, label="reward")
        right.tick_params(axis="y", colors=_GREY)
        right.spines[["top", "left"]].set_visible(False)
    axis.set(title=f"{title} by {by}", xlabel=unit, ylabel="%", ylim=(0, 105))
    axis.grid(alpha=0.25)
    axis.margins(x=0.06)
    best = max([0.0, *scores, *rates])
    place = "upper left" if best < 60 else "lower right"  # where the curves are not
    axis.legend(handles=handles, loc=place, fontsize=9, frameon=False)


def _staleness(axis: Any, lines: Sequence[Line]) -> None:
    totals: Counter[int] = Counter()
    for line in lines:
        tokens = line.get("staleness/histogram", [])
        totals.update({age: count or 0 for age, count in enumerate(tokens)})
    everything = max(1, totals.total())
    ages = range(max(totals, default=0) + 1)
    shares = [100 * totals[age] / everything for age in ages]
    bars = axis.bar([str(age) for age in ages], shares, color=_TRAIN, width=0.7)
    axis.bar_label(bars, fmt="%.1f%%", fontsize=9, padding=2)
    axis.set(
        title="age of trained tokens", xlabel="versions older than the weights they train",
        ylabel="% of tokens", ylim=(0, 118), yticks=(0, 50, 100),
        xlim=(-0.9, max(2, len(ages)) - 0.1),
    )  # fmt: skip


def _stages(axis: Any, episodes: Sequence[Line]) -> None:
    trained = [e["stages_s"] for e in episodes if e["outcome"] == "trained" and e.get("stages_s")]
    means = [
        math.fsum(stages.get(name) or 0.0 for stages in trained) / max(1, len(trained))
        for name in _EPISODE_STAGES
    ]
    names = list(_EPISODE_STAGES.values())
    bars = axis.barh(names, means, color=_TRAIN, height=0.65)
    axis.bar_label(bars, [_precise(mean) for mean in means], fontsize=9, padding=4)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set(title="where a trained episode's time went", xlabel="seconds, mean")


def _where_time_went(axis: Any, lines: Sequence[Line]) -> None:
    steps = [line for line in lines if line.get("time/train_s") is not None]
    whole = math.fsum(line.get(name) or 0.0 for line in steps for name in _STAGES)
    bottom = [0.0] * len(steps)
    for name, (label, color) in _STAGES.items():
        seconds = [line.get(name) or 0.0 for line in steps]
        total = math.fsum(seconds)
        axis.bar(
            [line["step"] for line in steps], seconds, bottom=bottom, width=1.0, color=color,
            label=f"{label}: {_duration(total)}, {total / max(whole, 1e-9):.0%}",
        )  # fmt: skip
        bottom = [a + b for a, b in zip(bottom, seconds, strict=True)]
    axis.set(title="where the trainer's time went", xlabel="step", ylabel="seconds in a step")
    axis.margins(x=0.02)
    axis.set_ylim(0, 1.35 * max(bottom, default=1.0) or 1.0)  # room for the legend
    axis.legend(loc="upper left", ncols=2, fontsize=8.5, frameon=False, columnspacing=1)


def _idle(axis: Any, lines: Sequence[Line]) -> None:
    for role, color in _ROLES.items():
        known = [line for line in lines if line.get(f"idle/{role}") is not None]
        if not known:
            continue
        steps = [line["step"] for line in known]
        shares = [100 * line[f"idle/{role}"] for line in known]
        mean = math.fsum(shares) / len(shares)
        axis.plot(steps, shares, ".", color=color, alpha=0.3, ms=5)
        label = f"{role.replace('_', ' ')}: mean {mean:.0f}%"
        axis.plot(steps, _smooth(shares), color=color, lw=2, label=label)
    axis.set(
        title=_smoothed("idle share of each role"), xlabel="step", ylabel="%", ylim=(-3, 125),
        yticks=range(0, 101, 20),
    )  # fmt: skip
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[1]:
        # Narrow, because a legend wider than its axes pushes the columns apart.
        axis.legend(
            loc="upper left", ncols=3, fontsize=8, frameon=False, columnspacing=0.8,
            handlelength=1, handletextpad=0.5,
        )  # fmt: skip


def _outcomes(axis: Any, episodes: Sequence[Line]) -> None:
    counts = Counter((episode["outcome"], episode["reason"]) for episode in episodes)
    rows = counts.most_common(_MOST_REASONS)[::-1]
    names = [f"{outcome}\n({reason})" if reason else outcome for (outcome, reason), _ in rows]
    colors = [_OUTCOMES.get(outcome, _GREY) for (outcome, _), _ in rows]
    bars = axis.barh(names, [number for _, number in rows], color=colors, height=0.65)
    labels = [f"{number:,}" for _, number in rows]
    axis.bar_label(bars, labels, fontsize=9, padding=4)
    axis.margins(x=0.18)
    if 0 < len(rows) < 4:
        axis.set_ylim(-0.8, 3.2)  # few bars stay bars
    axis.set(title=f"what became of {len(episodes):,} episodes", xlabel="episodes")


def _task_sets(lines: Sequence[Line]) -> list[str]:
    """Their names, of a run that has some."""
    name = "success_rate/"
    found = dict.fromkeys(field for line in lines for field in line if field.startswith(name))
    return [field.removeprefix(name) for field in found]


def _of_sets(
    axis: Any,
    lines: Sequence[Line],
    sets: Sequence[str],
    metric: str,
    *,
    title: str,
    percent: bool = False,
) -> None:
    """A metric of each task set by step; held out, where it is a success rate."""
    scale = 100 if percent else 1
    for number, name in enumerate(sets):
        color = f"C{number}"
        trained = [line for line in lines if line.get(f"{metric}/{name}") is not None]
        values = _smooth([scale * line[f"{metric}/{name}"] for line in trained])
        axis.plot([line["step"] for line in trained], values, color=color, lw=2, label=name)
        held = f"eval/{metric}/{name}"
        evaluated = [line for line in lines if line.get(held) is not None] if percent else []
        steps = [line.get("eval/version", line["step"]) for line in evaluated]
        axis.plot(steps, [scale * line[held] for line in evaluated], "o--", color=color, ms=4, lw=1)
    title = f"{title} by task set"
    axis.set(title=title, xlabel="step", ylabel="%; dots: held out" if percent else "")
    if percent:
        axis.set_ylim(0, 105)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False)


def _outcomes_of_sets(axis: Any, episodes: Sequence[Line], sets: Sequence[str]) -> None:
    counts = Counter((episode.get("task_set", ""), episode["outcome"]) for episode in episodes)
    ended = [0] * len(sets)
    for outcome, color in _OUTCOMES.items():
        numbers = [counts[name, outcome] for name in sets]
        axis.barh(sets, numbers, left=ended, color=color, height=0.65, label=outcome)
        ended = [a + b for a, b in zip(ended, numbers, strict=True)]
    axis.invert_yaxis()
    axis.set(title="episodes by task set", xlabel="episodes")
    axis.set_ylim(len(sets) + 0.2, -0.8)  # room for the legend
    axis.legend(loc="lower right", ncols=2, fontsize=8, frameon=False)


def _title(run: Path, lines: Sequence[Line]) -> str:
    path = run / "summary.json"
    if not path.exists():
        return f"{run.resolve().name}: not ended, {len(lines)} lines so far"
    summary = json.loads(path.read_text())
    title = (
        f"{run.resolve().name}: {summary['env']}, α={summary['alpha']:g}, seed {summary['seed']}, "
        f"{summary['steps']} steps in {_duration(summary['time_s'])}"
    )
    first, last = summary.get("eval_success_rate_first"), summary.get("eval_success_rate_last")
    if first is not None and last is not None:
        title += f"; held-out success {first:.0%} → {last:.0%} ({100 * (last - first):+.0f} points)"
    return title


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean of the last few values."""
    windows = [values[max(0, end - _SMOOTH) : end] for end in range(1, len(values) + 1)]
    return [math.fsum(window) / len(window) for window in windows]


def _smoothed(what: str) -> str:
    return f"{what} (mean of {_SMOOTH} steps)"


def _known(line: Line) -> Line:
    """The line without what was not measured: null, nan and the infinities."""
    return {
        name: value
        for name, value in line.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


def _precise(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{1000 * seconds:.0f} ms" if seconds >= 0.001 or not seconds else "< 1 ms"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def main() -> None:
    """Draws the report of each folder that the command line names."""
    if not (folders := sys.argv[1:]):
        raise ValueError(
            "draw what? Give a run's folder: python -m flash.telemetry.report runs/NAME"
        )
    for folder in map(Path, folders):
        if not (folder / "metrics.jsonl").is_file():
            raise ValueError(f"{folder} holds no metrics.jsonl: give the folder of a run")
        print(write_report(folder))


if __name__ == "__main__":
    sys.exit(ended(main))
