"""Small runs that are killed and resumed, until so many kills are survived.

    python -m tests.crash [-n 20] [--first 0] [--steps 40] [--keep FOLDER]

Prints a table by role, and what was lost, came twice or was broken.
"""

import argparse
import contextlib
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.crash.kills import CHILDREN, ENDS_RUN, Failed, KilledRun, Result, cycle
from tests.crash.plans import draw
from tests.postgres import postgres

ROLES = (*ENDS_RUN, *CHILDREN, "postgres")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=20, help="how many kills")
    parser.add_argument("--first", type=int, default=0, help="the first run's seed")
    parser.add_argument("--steps", type=int, default=40, help="of a run")
    parser.add_argument("--of-run", type=int, default=20, help="kills of one run at most")
    parser.add_argument("--keep", type=Path, help="a folder for the runs, which stay")
    parser.add_argument("--roles", default=",".join(ROLES), help="of what is killed")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # with the run
    results: list[Result] = []
    broken = False
    began = time.perf_counter()
    seed = options.first
    with tempfile.TemporaryDirectory(prefix="crash-") as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        while (left := options.n - sum(len(result.kills) for result in results)) > 0:
            plan = draw(seed, steps=options.steps)
            print(f"seed {seed}: {plan.settings | {'log': 'postgres' * plan.postgres}}", flush=True)
            roles = cycle(tuple(options.roles.split(",")), random.Random(seed))
            with postgres(folder) if plan.postgres else contextlib.nullcontext() as database:
                run = KilledRun(plan, folder / f"seed_{seed}", roles=roles, database=database)
                try:
                    run.play(min(left, options.of_run))
                except Failed as failure:
                    print(f"seed {seed} FAILED: {failure}", flush=True)
                    broken = True
                if not run.result.held:
                    broken = True
                    for what in (*run.result.lost, *run.result.doubled, *run.result.broken):
                        print(f"seed {seed}: {what}", flush=True)
                    for what in run.result.unequal:
                        print(f"seed {seed}: {what}", flush=True)
            results.append(run.result)
            seed += 1
    print(table(results))
    print(f"{len(results)} runs in {time.perf_counter() - began:.0f} s")
    return 1 if broken else 0


def table(results: list[Result]) -> str:
    """By role: kills, runs that went on, what was lost and what came twice."""
    kills = [kill for result in results for kill in result.kills]
    lost = Counter(role for result in results for role, _ in result.lost)
    doubled = Counter(role for result in results for role, _ in result.doubled)
    lines = ["| killed | kills | went on | lost | doubled |", "|---|---|---|---|---|"]
    for role in ROLES:
        of_role = [kill for kill in kills if kill.role == role]
        resumed = sum(kill.resumed for kill in of_role)
        lines.append(f"| {role} | {len(of_role)} | {resumed} | {lost[role]} | {doubled[role]} |")
    resumed = sum(kill.resumed for kill in kills)
    lines.append(
        f"| all | {len(kills)} | {resumed} | {sum(lost.values())} | {sum(doubled.values())} |"
    )
    for what, times in (
        ("started", [s for result in results for s in result.begins_s]),
        ("resumed", [s for result in results for s in result.resumes_s]),
    ):
        if times:
            lines.append(
                f"\n{what} in {statistics.median(times):.1f} s, the median of {len(times)}"
            )
    turns, kept = (sum(getattr(r, name) for r in results) for name in ("turns", "turns_kept"))
    lines.append(f"\nturns of episodes that were cut off: {turns}, and kept: {kept}")
    compared = sum(result.compared for result in results)
    unequal = sum(len(result.unequal) for result in results)
    lines.append(f"\nweights of {compared} versions made by more than one start: {unequal} differ")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
