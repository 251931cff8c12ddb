"""Pictures of simulations: one run, or what a sweep changes."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flash.simulate.plan import Plan
from flash.simulate.results import Result, Row

_BLUE, _RED, _GREEN, _ORANGE, _GREY = "#3b6ea8", "#c2443f", "#4f9a63", "#e08a4e", "#d9d9d9"
_LINES = (_BLUE, _RED, _GREEN, _ORANGE, "#a58bc4", "#cdb45f", "#8c8c8c")
_STAGES = ("env", "generate", "reward", "wait")


def draw_sweep(rows: Sequence[Row]) -> Figure:
    """The first field of the sweep along the axis, a line for each value of the others."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    field, *others = rows[0].changes
    figure.suptitle(rows[0].results[0].scenario.name, fontsize=13, x=0.008, ha="left")
    panels: Any = figure.subplots(2, 2)
    titles = {
        "samples_per_s": "samples a second",
        "idle": "idle share: trainer (solid), workers (dashed)",
        "staleness_mean": "age of trained tokens: mean (solid), largest (dashed)",
        "wasted_share": "share of sampled tokens that were not trained",
    }
    lines: dict[str, list[Row]] = {}
    for row in rows:
        label = ", ".join(f"{name}={row.changes[name]}" for name in others)
        lines.setdefault(label, []).append(row)
    for axes, (quantity, title) in zip(panels.flat, titles.items(), strict=True):
        for colour, (label, points) in zip(_LINES * 9, lines.items(), strict=False):
            values = [row.changes[field] for row in points]
            numbers = all(isinstance(v, int | float) for v in values)
            x = values if numbers else [str(v) for v in values]
            solid, dashed = {
                "idle": ("idle_trainer", "idle_workers"),
                "staleness_mean": ("staleness_mean", "staleness_max"),
            }.get(quantity, (quantity, None))
            y = [row.mean(solid) for row in points]
            axes.plot(x, y, "o-", color=colour, label=label)
            if len(points[0].results) > 1:
                spread = [row.spread(solid) for row in points]
                axes.fill_between(
                    x,
                    [a - b for a, b in zip(y, spread, strict=True)],
                    [a + b for a, b in zip(y, spread, strict=True)],
                    color=colour, alpha=0.2, linewidth=0,
                )  # fmt: skip
            if dashed:
                axes.plot(x, [row.mean(dashed) for row in points], "s--", color=colour, alpha=0.6)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(field)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    if others:
        panels.flat[0].legend(fontsize=8)
    return figure


def draw_plan(plan: Plan) -> Figure:
    """Speed against age: what was tried, the best of each α, and the one to take."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for choices, style in (
        (plan.tried, {"color": _GREY, "label": "tried"}),
        (plan.best, {"color": _BLUE, "label": "best of its alpha"}),
        ([plan.recommended], {"color": _RED, "label": "to take", "s": 90}),
    ):
        axes.scatter(
            [choice.result.staleness_mean for choice in choices],
            [choice.result.samples_per_s for choice in choices],
            **style,
        )
    frontier = [(c.result.staleness_mean, c.result.samples_per_s) for c in plan.best]
    axes.plot(*zip(*frontier, strict=True), color=_BLUE, linewidth=1)
    oldest = max(age for age, _ in frontier)
    for choice, (age, speed) in zip(plan.best, frontier, strict=True):
        right = age > oldest / 2
        axes.annotate(
            f"α={choice.alpha:g}, {choice.workers} workers, trainer {choice.trainer_gpus}",
            (age, speed), textcoords="offset points", fontsize=8,
            xytext=(-8, 6) if right else (8, -12), ha="right" if right else "left",
        )  # fmt: skip
    axes.set_xlabel("mean age of trained tokens, in versions")
    axes.set_ylabel("samples a second")
    axes.set_ylim(0, 1.1 * max(choice.result.samples_per_s for choice in plan.tried))
    axes.margins(x=0.05)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def draw_run(result: Result) -> Figure:
    """Where the trainer's and the episodes' time went, and how old what was trained is."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{result.scenario.name}: {result.samples_per_s:.3g} samples/s, idle: trainer "
        f"{result.idle_trainer:.0%}, workers {result.idle_workers:.0%}",
        fontsize=13, x=0.008, ha="left",
    )  # fmt: skip
    panels: Any = figure.subplots(2, 2)
    _draw_steps(panels[0, 0], result)
    _draw_ages(panels[0, 1], result)
    _draw_stages(panels[1, 0], result)
    _draw_durations(panels[1, 1], result)
    return figure


def _draw_steps(axes: Any, result: Result) -> None:
    numbers = [step.step for step in result.steps]
    below = [0.0] * len(numbers)
    for name, colour in (("train_s", _BLUE), ("publish_s", _ORANGE), ("wait_s", _GREY)):
        heights = [getattr(step, name) for step in result.steps]
        label = {"wait_s": "wait for a batch"}.get(name, name.removesuffix("_s"))
        axes.bar(numbers, heights, bottom=below, width=1.0, color=colour, label=label)
        below = [a + b for a, b in zip(below, heights, strict=True)]
    axes.set_title("seconds of each step", fontsize=10, loc="left")
    axes.set_xlabel("step")
    axes.legend(fontsize=8)


def _draw_ages(axes: Any, result: Result) -> None:
    total = sum(result.ages.values()) or 1.0
    axes.bar(list(result.ages), [n / total for n in result.ages.values()], color=_RED)
    axes.set_title("share of trained tokens by age in versions", fontsize=10, loc="left")
    axes.set_xticks(list(result.ages))


def _draw_stages(axes: Any, result: Result) -> None:
    trained = [e for e in result.episodes if e.outcome == "trained"]
    means = [fmean(e.stages_s.get(s, 0.0) for e in trained) if trained else 0.0 for s in _STAGES]
    axes.barh(_STAGES, means, color=_GREEN)
    axes.invert_yaxis()
    axes.set_title("seconds of a trained episode, mean", fontsize=10, loc="left")


def _draw_durations(axes: Any, result: Result) -> None:
    for outcome, colour in (("trained", _BLUE), ("dropped", _ORANGE), ("cancelled", _RED)):
        seconds = [
            e.ended_s - e.admitted_s - e.stages_s.get("wait", 0.0)
            for e in result.episodes
            if e.outcome == outcome
        ]
        if seconds:
            axes.hist(seconds, bins=50, color=colour, alpha=0.7, label=outcome)
    axes.set_title("episodes by their seconds until the reward", fontsize=10, loc="left")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
