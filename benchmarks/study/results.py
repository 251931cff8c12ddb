"""From cells to numbers: means and 95% confidence intervals over seeds, a table, a figure."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Two-sided 95% of Student's t by degrees of freedom; from 10 on as if there were infinitely many.
_T = (float("nan"), 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
_FIRST_STEP = 10  # before it not even forced staleness is what it should be
_OF_STEPS = {
    "ess": "importance/ess",
    "kl": "kl_behaviour",
    "weight_p01": "weight/p01",
    "weight_p99": "weight/p99",
    "stopped": "ratio/clip_fraction",
    "age": "age/mean",
    "alpha_in_force": "alpha",
}
_CURVES = ("reward", "time_s", "samples", "importance/ess", "kl_behaviour", "alpha")
_COLOURS = {
    "vanilla": "tab:red",
    "opmd": "tab:brown",
    "ppo": "tab:purple",
    "decoupled_ppo": "tab:blue",
    "tis": "tab:cyan",
    "topr": "tab:green",
}


def summarise(folder: Path) -> list[dict[str, Any]]:
    """One row for each mode, arm and α, over the seeds that are there."""
    kinds: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        cell = result["cell"]
        kinds[cell["mode"], cell["arm"], cell["alpha"]].append(result)
    return [_row(*kind, results) for kind, results in sorted(kinds.items())]


def _row(mode: str, arm: str, alpha: int, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    finals = [result["final"] for result in results]
    steps = [step for result in results for step in result["steps"][_FIRST_STEP:]]
    mean, interval = with_interval(finals)
    return {
        "mode": mode,
        "arm": arm,
        "alpha": alpha,
        "seeds": len(results),
        "final": mean,
        "final_interval": interval,
        "finals": finals,
        "time_s": float(np.mean([result["steps"][-1]["time_s"] for result in results])),
        "wasted_tokens": float(np.mean([result["wasted_tokens"] for result in results])),
        **{
            name: float(np.mean([step[of] for step in steps if of in step] or [np.nan]))
            for name, of in _OF_STEPS.items()
        },
        "curves": {
            name: [[step.get(name) for step in result["steps"]] for result in results]
            for name in _CURVES
        },
    }


def with_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% confidence interval (nan for a single value)."""
    count = len(values)
    if count < 2:
        return float(np.mean(values)), float("nan")
    t = _T[count - 1] if count <= len(_T) else 1.96
    return float(np.mean(values)), float(t * np.std(values, ddof=1) / np.sqrt(count))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row."""
    lines = [
        f"{'mode':8} {'objective':13} {'alpha':>5} {'seeds':>5} {'held-out score':>14} {'ESS':>5} "
        f"{'KL':>6} {'weights p01':>11} {'p99':>5} {'stopped':>7} {'age':>4} {'time s':>6}"
    ]
    for row in rows:
        score = f"{row['final']:.2f} ± {row['final_interval']:.2f}"
        lines.append(
            f"{row['mode']:8} {row['arm']:13} {row['alpha']:5} {row['seeds']:5} {score:>14} "
            f"{row['ess']:5.2f} {row['kl']:6.3f} {row['weight_p01']:11.2f} "
            f"{row['weight_p99']:5.2f} {row['stopped']:7.1%} {row['age']:4.1f} {row['time_s']:6.0f}"
        )
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Score and effective sample size by forced staleness; learning by step and by time."""
    import matplotlib  # noqa: PLC0415  (slow to import)

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    forced = [row for row in rows if row["mode"] == "forced"]
    for arm, colour in _COLOURS.items():
        of_arm = [row for row in forced if row["arm"] == arm]
        if not of_arm:
            continue
        alphas = [row["alpha"] for row in of_arm]
        scores = [row["final"] for row in of_arm]
        # Of two seeds it says nothing: Student's t has one degree of freedom.
        intervals = [row["final_interval"] if row["seeds"] > 2 else np.nan for row in of_arm]
        axes[0, 0].errorbar(
            alphas, scores, intervals, fmt="o-", color=colour, label=arm, capsize=3, alpha=0.8
        )
        axes[0, 1].plot(alphas, [row["ess"] for row in of_arm], "o-", color=colour, label=arm)
        for row in of_arm:
            if row["alpha"] == max(alphas):
                _band(axes[1, 0], row, None, color=colour, label=f"{arm}, {row['alpha']} old")
    for row in rows:
        if row["mode"] != "forced" and row["arm"] in ("vanilla", "decoupled_ppo"):
            style = {0: "-", 2: "--", 8: ":"}.get(row["alpha"], "-.")
            bound = (
                f"α={row['alpha']}" if row["mode"] == "natural" else f"adaptive α≤{row['alpha']}"
            )
            colour = _COLOURS[row["arm"]] if row["mode"] == "natural" else (
                "tab:orange" if row["arm"] == "vanilla" else "black"
            )  # fmt: skip
            _band(
                axes[1, 1], row, "time_s", color=colour, linestyle=style,
                label=f"{row['arm']}, {bound}",
            )  # fmt: skip
    for panel, (title, x, y) in zip(
        axes.flat,
        (
            ("every token exactly so old", "versions", "held-out score (95% over seeds)"),
            ("what is left of a batch", "versions", "effective sample size of π/π_behaviour"),
            ("at the largest forced age", "step (64 samples each)", "reward, mean of 5 steps"),
            ("asynchronous runs, α as a bound", "virtual seconds", "reward, mean of 5 steps"),
        ),
        strict=True,
    ):
        panel.set(title=title, xlabel=x, ylabel=y)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=7)
    axes[0, 0].set_ylim(0, 1)
    axes[1, 1].set_xscale("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _band(axes: Any, row: dict[str, Any], by: str | None, **style: Any) -> None:
    """Mean reward over seeds, smoothed over five steps, with the range of the seeds."""
    kernel = np.ones(5) / 5
    rewards = np.array([np.convolve(of, kernel, "valid") for of in row["curves"]["reward"]])
    x = np.arange(5, 5 + rewards.shape[1])
    if by is not None:
        x = np.mean(row["curves"][by], axis=0)[4:]
    axes.plot(x, rewards.mean(0), **style)
    axes.fill_between(x, rewards.min(0), rewards.max(0), color=style["color"], alpha=0.1)
