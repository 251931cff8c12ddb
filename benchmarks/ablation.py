"""What each feature is worth: an agentic job with all of them, and with each one off in turn.

Simulated: half of `scenarios/agentic_128.yaml`, that is 64 GPUs, 12 workers of 4 and a trainer of
16, batches of 256; its episodes have long tails, and a task's responses are alike in length. A
feature off is the setting that the field uses in its place.

    python benchmarks/ablation.py
"""

import json
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flash.simulate import Result, Scenario, load, simulate

HERE = Path(__file__).parent
RESULTS, PICTURE = HERE / "results" / "ablation.json", HERE / "pictures" / "ablation.png"
SEEDS = (0,)

Row = dict[str, Any]

ALL = {
    "time_s": None, "steps": 8, "batch_size": 256, "workers.count": 12, "trainer.gpus": 16,
    "alpha": 2, "rollout.redundant_groups": 4, "rollout.redundant_episodes": 1,
    "rollout.filters": ["equal_rewards"], "workload.success_rate": 0.7,
    "workload.response_scale": {"kind": "lognormal", "mean": 1, "sigma": 0.5},
}  # fmt: skip
OFF: dict[str, dict[str, Any]] = {
    "all features": {},
    "no asynchrony (α = 0)": {"alpha": 0},
    "one step off (α = 1)": {"alpha": 1},
    "no redundant groups": {"rollout.redundant_groups": 0},
    "no redundant episodes": {"rollout.redundant_episodes": 0},
    "no redundancy at all": {"rollout.redundant_groups": 0, "rollout.redundant_episodes": 0},
    "batches, not a queue": {"rollout.schedule": "batch"},
    "no prompt replication": {"rollout.replicate": False},
    "publish drains (wait)": {"workers.update_mode": "wait"},
    "stale groups dropped": {"rollout.on_stale": "drop"},
    "none of them": {
        "alpha": 0, "rollout.redundant_groups": 0, "rollout.redundant_episodes": 0,
        "rollout.schedule": "batch", "rollout.replicate": False, "workers.update_mode": "wait",
    },
}  # fmt: skip


def mean(results: list[Result], name: str) -> float:
    return fmean(getattr(result, name) for result in results)


def main() -> None:
    job: Scenario = load(HERE / "scenarios" / "agentic_128.yaml").changed(ALL)
    print(f"{'':24} speed  samples/s  idle: trainer  workers  age: mean  max  wasted")
    rows: list[Row] = []
    for name, changes in OFF.items():
        results = [simulate(job.changed({**changes, "seed": seed})) for seed in SEEDS]
        row: Row = {
            "name": name,
            "samples_per_s": mean(results, "samples_per_s"),
            "idle_trainer": mean(results, "idle_trainer"),
            "idle_workers": mean(results, "idle_workers"),
            "staleness_mean": mean(results, "staleness_mean"),
            "staleness_max": max(result.staleness_max for result in results),
            "wasted_share": mean(results, "wasted_share"),
        }
        rows.append(row)
        speed = row["samples_per_s"] / rows[0]["samples_per_s"]
        print(
            f"{name:24}{speed:6.0%}{row['samples_per_s']:11.2f}{row['idle_trainer']:15.0%}"
            f"{row['idle_workers']:9.0%}{row['staleness_mean']:11.2f}{row['staleness_max']:5}"
            f"{row['wasted_share']:8.1%}",
            flush=True,
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")
    draw(rows).savefig(PICTURE, dpi=100)
    print(f"written to {RESULTS} and {PICTURE}")


def draw(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    speeds = [row["samples_per_s"] / rows[0]["samples_per_s"] for row in rows]
    colours = ["#2a6fdb", *["#8d99ae"] * (len(rows) - 2), "#d1495b"]
    bars = axes.barh([row["name"] for row in rows], speeds, color=colours)
    axes.bar_label(bars, [f" {speed:.0%}" for speed in speeds], fontsize=9)
    axes.axvline(1.0, color="#2a6fdb", linewidth=0.8, linestyle=":")
    axes.invert_yaxis()
    axes.set_xlabel("samples a second, against all features; simulated, 64 GPUs")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
