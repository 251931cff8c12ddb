"""Schedules by the thousand, side by side on the cores.

    python -m tests.faults.soak [-n 1000] [--first 0] [--seed SEED]

Prints the seeds that fail and how the others ended; `--seed` replays one, with its trace.
"""

import argparse
import multiprocessing
import sys
import time
from collections import Counter

from tests.faults.schedule import Schedule, Violation


def outcome(seed: int) -> tuple[int, str, str]:
    """How a schedule ended, and the violation, if any."""
    schedule = Schedule(seed)
    try:
        schedule.run()
    except Violation as violation:
        return seed, "violation", str(violation)
    return seed, schedule.outcome, ""


def replay(seed: int) -> None:
    schedule = Schedule(seed)
    try:
        schedule.run()
    finally:
        for at, *what in schedule.trace:
            print(f"{at:12.6f}", *what)
        print(schedule.settings, schedule.rates, schedule.outcome, schedule.digest())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", type=int, default=1000, help="how many schedules")
    parser.add_argument("--first", type=int, default=0, help="the first one's seed")
    parser.add_argument("--seed", type=int, help="replay this one")
    options = parser.parse_args()
    if options.seed is not None:
        replay(options.seed)
        return 0
    began = time.perf_counter()
    outcomes: Counter[str] = Counter()
    seeds = range(options.first, options.first + options.n)
    with multiprocessing.get_context("spawn").Pool() as pool:
        for _, ended, violation in pool.imap_unordered(outcome, seeds, chunksize=20):
            outcomes[ended] += 1
            if violation:
                print(violation, flush=True)
    print(f"{options.n} schedules in {time.perf_counter() - began:.0f} s: {dict(outcomes)}")
    return 1 if outcomes["violation"] else 0


if __name__ == "__main__":
    sys.exit(main())
