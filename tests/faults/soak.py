"""Schedules by the thousand, side by side on the cores.

    python -m tests.faults.soak [-n 1000] [--first 0] [--kind KIND] [--seed SEED]

plain: a run with faults. logged: one that is killed again and again, with its log on a disk that
goes wrong; these take longer, and there are a tenth as many. sets, logged_sets: the same of several
task sets. explorers: as logged, with explorers that come, go, die and are cut off; explored_sets:
of several task sets, which not all of them bring. Prints the seeds that fail and how the others
ended; `--seed` replays one, with its trace.
"""

import argparse
import functools
import multiprocessing
import sys
import time
import traceback
from collections import Counter

from tests.faults.explored import ExploredSchedule, ExploredSets
from tests.faults.logged import LoggedSchedule, LoggedSets
from tests.faults.schedule import Schedule, ScheduleOfSets, Violation

KINDS = {
    "plain": Schedule, "logged": LoggedSchedule, "sets": ScheduleOfSets, "logged_sets": LoggedSets,
    "explorers": ExploredSchedule, "explored_sets": ExploredSets,
}  # fmt: skip
# Of so many schedules one.
SHARES = {
    "plain": 1,
    "logged": 10,
    "sets": 4,
    "logged_sets": 40,
    "explorers": 10,
    "explored_sets": 40,
}


def outcome(kind: str, seed: int) -> tuple[Counter[str], str]:
    """How each start of a schedule ended, and the violation, if any."""
    schedule = KINDS[kind](seed)
    try:
        schedule.run()
    except Violation as violation:
        return Counter({"violation": 1}), str(violation)
    return schedule.ends, ""


def replay(kind: str, seed: int) -> None:
    schedule = KINDS[kind](seed)
    try:
        schedule.run()
    except Violation as violation:
        print(violation)
        traceback.print_exception(violation.__cause__)
    finally:
        for at, *what in schedule.trace:
            print(f"{at:12.6f}", *what)
        print(schedule.settings, schedule.rates, schedule.outcome, schedule.digest())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=1000, help="how many schedules")
    parser.add_argument("--first", type=int, default=0, help="the first one's seed")
    parser.add_argument("--kind", choices=KINDS, help="only these")
    parser.add_argument("--seed", type=int, help="replay this one")
    options = parser.parse_args()
    if options.seed is not None:
        replay(options.kind or "plain", options.seed)
        return 0
    broken = 0
    for kind in [options.kind] if options.kind else KINDS:
        began = time.perf_counter()
        ends: Counter[str] = Counter()
        n = options.n if options.kind else -(-options.n // SHARES[kind])
        seeds = range(options.first, options.first + n)
        with multiprocessing.get_context("spawn").Pool() as pool:
            run = functools.partial(outcome, kind)
            for ended, violation in pool.imap_unordered(run, seeds, chunksize=20):
                ends += ended
                if violation:
                    print(f"--kind {kind}: {violation}", flush=True)
        took_s = time.perf_counter() - began
        print(f"{n} {kind} schedules in {took_s:.0f} s: {dict(sorted(ends.items()))}")
        broken += ends["violation"]
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
