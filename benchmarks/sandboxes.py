"""What sandboxes cost: opened and closed, and commands run in one that is open, so many at once.

python benchmarks/sandboxes.py --at-once 1,4,16
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from flash.sandbox import open_sandbox

RESULTS = Path(__file__).parent / "results"


async def opened() -> None:
    async with open_sandbox():
        pass


async def per_s(action: Callable[[], Awaitable[object]], *, times: int, at_once: int) -> float:
    room = asyncio.Semaphore(at_once)

    async def one() -> None:
        async with room:
            await action()

    start = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(times):
            tasks.create_task(one())
    return times / (time.perf_counter() - start)


async def memory_mb() -> float:
    """Of one that is open and idle: what its processes share with none."""
    async with open_sandbox() as sandbox:
        await sandbox.run(["true"])
        inside = psutil.Process().children(recursive=True)
        return sum(process.memory_full_info().uss for process in inside) / 2**20


async def measure(at_once: list[int], times: int) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for many in at_once:
        async with open_sandbox() as sandbox:
            rows.append(
                {
                    "at once": many,
                    "opened and closed per s": await per_s(opened, times=times, at_once=many),
                    "`true` per s": await per_s(
                        lambda: sandbox.run(["true"]), times=times, at_once=many
                    ),
                    "Python per s": await per_s(
                        lambda: sandbox.run([sys.executable, "-c", ""]), times=times, at_once=many
                    ),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--at-once", default="1,4,16")
    parser.add_argument("--times", type=int, default=64)
    args = parser.parse_args()
    rows = asyncio.run(measure([int(n) for n in args.at_once.split(",")], args.times))
    print("| " + " | ".join(rows[0]) + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(f"{value:.0f}" for value in row.values()) + " |")
    idle = asyncio.run(memory_mb())
    print(f"\nan idle one holds {idle:.1f} MB")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "sandboxes.json").write_text(json.dumps({"rows": rows, "idle_mb": idle}, indent=1))


if __name__ == "__main__":
    main()
