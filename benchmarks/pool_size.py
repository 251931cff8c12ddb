"""What the size of a pool costs: the simulator, the hub's dispatch, and a publish in waves.

simulate    an agentic job on 128 to 2,048 GPUs (`scenarios/agentic_128.yaml`, all of it so many
            times): CPU time of the simulation a request, and seconds of simulated publishes
dispatch    requests through a RequestQueue over ever more workers, each busy with some
publish     the job on 128 GPUs with other shares of the pool out for new weights at a time,
            for loads of ever more seconds: its speed over that of one worker at a time

python benchmarks/pool_size.py [--only simulate] [--times 1,4,16] [--steps 3]
"""

import argparse
import asyncio
import random
import time
from collections import deque
from functools import partial
from pathlib import Path
from unittest.mock import patch

from flash.fakes import FakeWorker
from flash.hub.queue import RequestQueue
from flash.hub.slot import Slot
from flash.simulate.results import Result
from flash.simulate.run import simulate
from flash.simulate.scenario import Scenario, load
from flash.types import GenerateRequest, SamplingParams

SCENARIO = Path(__file__).parent / "scenarios" / "agentic_128.yaml"
POOLS = (8, 64, 512, 2048)
REQUESTS = 20_000
LOADS_S = (0.5, 5.0, 20.0)
SHARES = {"one": 0.0, "1/8": 0.125, "1/4": 0.25, "1/2": 0.5, "all": 1.0}


def job(times: int, steps: int, **changes: float) -> Scenario:
    """The agentic job on so many times 128 GPUs."""
    size = {"workers.count": 24 * times, "trainer.gpus": 32 * times, "batch_size": 512 * times}
    return load(SCENARIO, {"time_s": None, "steps": steps, **size, **changes})


def measure_simulations(times: list[int], steps: int) -> None:
    print("   GPUs  workers  in flight  requests   CPU s  ms/request  publish s: first  last")
    for number in times:
        scenario = job(number, steps)
        result = simulate(scenario)
        requests = sum(episode.turns for episode in result.episodes)
        print(
            f"{scenario.gpus:7}{scenario.workers.count:9}{2 * scenario.batch_size:11}{requests:10}"
            f"{result.took_s:8.1f}{1000 * result.took_s / requests:12.3f}"
            f"{result.steps[0].publish_s - scenario.trainer.export_s:18.1f}"
            f"{result.steps[-1].publish_s - scenario.trainer.export_s:6.1f}",
            flush=True,
        )


async def dispatch(workers: int) -> float:
    """Seconds of CPU a request: in at one worker, out at another."""
    slots = [Slot(FakeWorker(f"worker {number}"), 0) for number in range(workers)]
    queue = RequestQueue(slots, max_running=64)
    request = GenerateRequest(token_ids=[1], sampling=SamplingParams(max_tokens=1))
    rng = random.Random(0)
    held: deque[tuple[Slot, int]] = deque()
    began = time.process_time()
    for arrival in range(REQUESTS):
        cost = rng.randrange(100, 1000)
        held.append((await queue.acquire(request, cost=cost, arrival=arrival), cost))
        if len(held) > 4 * workers:
            slot, cost = held.popleft()
            queue.release(slot, cost=cost)
    return (time.process_time() - began) / REQUESTS


def measure_dispatch() -> None:
    print("workers  CPU µs/request")
    for workers in POOLS:
        print(f"{workers:7}{1e6 * asyncio.run(dispatch(workers)):16.1f}", flush=True)


def with_each_share(scenario: Scenario) -> list[Result]:
    """As many workers out at a time as each of the shares says."""
    results = []
    for share in SHARES.values():
        with patch("flash.hub.publisher.spared", partial(_at_least_one, share)):
            results.append(simulate(scenario))
    return results


def _at_least_one(share: float, workers: int) -> int:
    return max(1, int(share * workers))


def measure_publishes(steps: int) -> None:
    print("load s  alpha" + "".join(f"{share:>16}" for share in SHARES))
    for load_s in LOADS_S:
        for alpha in (0, 1):
            results = with_each_share(job(1, steps, alpha=alpha, **{"workers.load_s": load_s}))
            cells = [
                f"{result.samples_per_s / results[0].samples_per_s:8.2f}x"
                f"{result.steps[-1].publish_s:5.0f} s"
                for result in results
            ]
            print(f"{load_s:6g}{alpha:7}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("simulate", "dispatch", "publish"))
    parser.add_argument("--times", default="1,4,16", help="of 128 GPUs")
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    if options.only in (None, "simulate"):
        measure_simulations([int(times) for times in options.times.split(",")], options.steps)
    if options.only in (None, "dispatch"):
        measure_dispatch()
    if options.only in (None, "publish"):
        measure_publishes(options.steps)


if __name__ == "__main__":
    main()
