"""A preset with each engine, as `flash train` runs it: how soon the first sample, how many tokens?

Each run is the command as a user gives it. The first sample counts from the command, with a small
policy that was warm-started before; tokens/s and CPU time (of all processes of the run) from the
first step to the last. The runs take turns; figures are medians.

    python benchmarks/engines.py [--preset alfworld] [--engines embedded,vllm] [--max-running 12,64]
        [--steps 10] [--repeats 3] [--folder runs/benchmarks]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from flash.system.machine import has_vllm

RESULTS = Path(__file__).parent / "results" / "engines.json"
LOOK_EVERY_S = 0.5

Row = dict[str, Any]


def run(name: str, folder: Path, arguments: list[str]) -> Row:
    """One run, watched from outside."""
    command = [
        str(Path(sys.executable).parent / "flash"), "train", *arguments, f"--name={name}",
        f"--runs_dir={folder}", "--eval_every=0", "--eval.tasks=1",
    ]  # fmt: skip
    began = time.monotonic()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    cpu_s: dict[int, float] = {}
    at_steps: list[float] = []
    while process.poll() is None:
        for child in [process, *process.children(recursive=True)]:
            try:
                times = child.cpu_times()
            except psutil.NoSuchProcess:
                continue
            cpu_s[child.pid] = times.user + times.system
        steps = [line for line in lines(folder / name / "metrics.jsonl") if line["step"]]
        at_steps += [sum(cpu_s.values())] * (len(steps) - len(at_steps))
        time.sleep(LOOK_EVERY_S)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    steps = [line for line in lines(folder / name / "metrics.jsonl") if line["step"]]
    episodes = lines(folder / name / "episodes.jsonl")
    tokens = steps[-1]["tokens/generated"] - steps[0]["tokens/generated"]
    # The clock of the run's loop is this machine's monotonic one.
    return {
        "first_sample_s": min(episode["ended_s"] for episode in episodes) - began,
        "tokens_per_s": tokens / (steps[-1]["time_s"] - steps[0]["time_s"]),
        "cpu_s_per_1000_tokens": 1000 * (at_steps[-1] - at_steps[0]) / tokens,
        "idle_trainer": statistics.mean(step["idle/trainer"] for step in steps[1:]),
    }


def lines(path: Path) -> list[Row]:
    if not path.exists():
        return []
    whole, _, _ = path.read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="alfworld")
    parser.add_argument("--engines", default="embedded,vllm")
    parser.add_argument(
        "--max-running", default="", help="the preset's, or some of your own: 12,64"
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks"))
    options, further = parser.parse_known_args()
    engines = options.engines.split(",")
    if "vllm" in engines and not has_vllm():
        print("vllm: not installed, left out (`make setup-vllm`)")
        engines.remove("vllm")
    ways = [(e, m) for e in engines for m in options.max_running.split(",")]
    found: dict[tuple[str, str], list[Row]] = {way: [] for way in ways}
    for repeat in range(options.repeats):
        for engine, max_running in ways:
            arguments = [options.preset, f"--engine={engine}", f"--steps={options.steps}", *further]
            if max_running:
                arguments.append(f"--engine.max_running={max_running}")
            name = f"{engine}-{max_running}-{time.time_ns()}"
            row = run(name, options.folder, arguments)
            found[engine, max_running].append(row)
            print(engine, max_running, repeat, json.dumps(row), file=sys.stderr, flush=True)
    rows = []
    print(f"{'engine':9} {'max_running':>11} {'first sample s':>14} {'tokens/s':>8} "
          f"{'CPU s/1000 tokens':>17} {'idle trainer':>12}")  # fmt: skip
    for (engine, max_running), runs in found.items():
        row = {name: statistics.median(one[name] for one in runs) for name in runs[0]}
        rows.append({"engine": engine, "max_running": max_running, **row})
        print(
            f"{engine:9} {max_running or 'preset':>11} {row['first_sample_s']:14.1f} "
            f"{row['tokens_per_s']:8.0f} {row['cpu_s_per_1000_tokens']:17.2f} "
            f"{row['idle_trainer']:12.0%}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"settings": vars(options), "rows": rows}, indent=2, default=str))
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
