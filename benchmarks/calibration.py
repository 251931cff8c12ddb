"""How well simulation predicts: real runs of a job at several α, and what each says of the others.

Two jobs run for real (sync_vs_async.py), each at α = 0, 1 and 2 in turn, which takes half an hour
of a machine that does nothing else. Then a scenario is fitted to each run, and the speed-up over
α = 0 that it predicts is compared with the measured one. Runs that are there are not run again.

    python benchmarks/calibration.py [--runs-dir runs/calibration]
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from flash.simulate import simulate
from flash.simulate.calibrate import Calibration, calibrate

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "calibration.json"
JOBS = {
    "varied steps": ["--steps", "20", "--mean-s", "1.5", "--sigma", "0.6"],
    "even steps": ["--steps", "16", "--mean-s", "3", "--sigma", "0.4", "--batch-size", "16"],
}
ALPHAS = (0, 1, 2)
SEEDS = 3


def run_for_real(folder: Path, options: list[str]) -> None:
    script, alphas = str(HERE / "sync_vs_async.py"), ",".join(map(str, ALPHAS))
    results = ["--runs-dir", str(folder), "--results", str(folder / "results.json")]
    subprocess.run([sys.executable, script, "--alphas", alphas, *results, *options], check=True)


def simulated_s(calibration: Calibration, alpha: float) -> float:
    """How long the job takes at that α, by this calibration; the mean of a few seeds."""
    runs = [
        simulate(calibration.scenario.changed({"alpha": alpha, "seed": seed}))
        for seed in range(SEEDS)
    ]
    return sum(run.time_s for run in runs) / SEEDS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/calibration"))
    options = parser.parse_args()
    rows = []
    print(f"{'job':12} {'run':>7} {'measured s':>10} {'simulated s':>11} "
          f"{'speed-up of':>11} {'measured':>8} {'simulated':>9} {'error':>6}")  # fmt: skip
    for job, arguments in JOBS.items():
        folder = options.runs_dir / job.replace(" ", "_")
        if not folder.exists():
            run_for_real(folder, arguments)
        fits = {alpha: calibrate(folder / f"sync_vs_async_alpha{alpha}") for alpha in ALPHAS}
        for fitted, fit in fits.items():
            times = {alpha: simulated_s(fit, alpha) for alpha in ALPHAS}
            for alpha in ALPHAS[1:]:
                measured = fits[0].measured_s / fits[alpha].measured_s
                predicted = times[0] / times[alpha]
                error = predicted / measured - 1
                print(
                    f"{job:12} alpha={fitted} {fit.measured_s:10.1f} {times[fitted]:11.1f} "
                    f"    alpha={alpha} {measured:7.2f}x {predicted:8.2f}x {error:+6.1%}",
                    flush=True,
                )
                rows.append(
                    {
                        "job": job, "fitted_to": fitted, "measured_s": fit.measured_s,
                        "simulated_s": times[fitted], "alpha": alpha,
                        "measured": measured, "simulated": predicted,
                    }
                )  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"jobs": JOBS, "rows": rows}, indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
