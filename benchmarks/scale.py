"""What one process bears: 1k to 16k EnvironmentAgents at a time, on workers that compute nothing.

    instant     workers and environments answer at once: what the hub, the loop and the agents
                cost, requests as fast as one core makes them
    latencies   a response takes 2 to 6 s and an environment's step 0.5 to 2 s: how late the event
                loop is while it has so many agents

The production's RolloutLoop, InferenceHub and agents, with the fakes of `flash.fakes`: episodes of
4 turns, 16 tokens a response, a trainer that trains nothing and publishes at once, batches of a
quarter of the agents. CPU time is of the process; lag is how late its event loop sees an event,
for its own work. With latencies a publish wakes no request, as it wakes none in a server of another
process. Memory is what the process grows by until it has warmed up.

    python benchmarks/scale.py [--agents 1000,4000,16000] [--seconds 20]
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import multiprocessing
import random
import time
import tracemalloc
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
from hub import lag, percentile

from flash.agents import EnvironmentAgent
from flash.cli.event_loop import run_loop
from flash.fakes import FakeEnvs, FakeStyle, FakeWorker
from flash.hub.hub import InferenceHub
from flash.hub.worker import OnTokens
from flash.rollout.config import RolloutSettings
from flash.rollout.loop import RolloutLoop
from flash.types import Completion, SamplingParams, Task, Weights

RESULTS = Path(__file__).parent / "results" / "scale.json"
TURNS, TOKENS, GROUP, WORKERS = 4, 16, 8, 8
LEAST_REQUESTS = 20_000

Row = dict[str, float]


class SleepingWorker(FakeWorker):
    """Takes its time for a whole response, and samples that at the end."""

    def __init__(self, name: str, *, seed: int, seconds: tuple[float, float]) -> None:
        super().__init__(name, load_s=(0.0, 0.0))
        self._random, self._seconds = random.Random(seed), seconds

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        await asyncio.sleep(self._random.uniform(*self._seconds))
        count = sampling.max_tokens
        return Completion(
            token_ids=[10] * count, logprobs=[-1.0] * count, versions=[self.version] * count,
            temperature=sampling.temperature, finish_reason="length", worker=self.name,
        )  # fmt: skip


async def measure(agents: int, *, instant: bool, seconds: float) -> Row:
    """Warms up for a batch, then measures: instant ones a number of requests, others a time."""
    batch_size = agents // 4 // GROUP * GROUP
    workers: list[FakeWorker] = [
        FakeWorker(f"worker {i}", seed=i, token_s=(0, 0), tokens=(TOKENS, TOKENS), load_s=(0, 0))
        if instant
        else SleepingWorker(f"worker {i}", seed=i, seconds=(2.0, 6.0))
        for i in range(WORKERS)
    ]
    step_s = (0.0, 0.0) if instant else (0.5, 2.0)
    envs, style = FakeEnvs(turns=(TURNS, TURNS), step_s=step_s), FakeStyle()
    before = psutil.Process().memory_info().rss
    async with (
        InferenceHub(workers, max_running=agents) as hub,
        RolloutLoop(
            hub,
            agent=lambda: EnvironmentAgent(envs=envs, style=style, max_tokens=TOKENS),
            tasks=map(Task, itertools.count()), batch_size=batch_size, group_size=GROUP, alpha=3,
            settings=RolloutSettings(on_stale="drop" if instant else "wait"),
        ) as rollouts,
    ):  # fmt: skip

        async def train(requests: float, seconds: float) -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    while hub.stats().requests < requests:
                        batch = await rollouts.next_batch()
                        weights = Weights(version=batch.version + 1, path=Path("/none"))
                        await rollouts.publish(weights)

        if instant:
            await train(agents, math.inf)
        else:
            await train(math.inf, 1.25 * seconds)
        grown = psutil.Process().memory_info().rss - before
        first, trained = hub.stats().requests, rollouts.ledger.count("trained")
        began, cpu_began = time.perf_counter(), time.process_time()
        async with lag() as lags:
            if instant:
                await train(first + max(LEAST_REQUESTS, TURNS * agents), math.inf)
            else:
                await train(math.inf, seconds)
        elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu_began
        requests = hub.stats().requests - first
        episodes = rollouts.ledger.count("trained") - trained
    return {
        "agents": agents,
        "episodes_per_s": episodes / elapsed,
        "requests_per_s": requests / elapsed,
        "cpu_ms_per_request": 1000 * cpu / requests,
        "cpu_share": cpu / elapsed,
        "lag_p50_ms": 1000 * percentile(lags, 50),
        "lag_p99_ms": 1000 * percentile(lags, 99),
        "kb_per_agent": grown / 1024 / agents,
    }


async def allocated(agents: int) -> float:
    """KB that Python has allocated for an agent in its first environment call."""
    envs, style = FakeEnvs(turns=(TURNS, TURNS), step_s=(1e3, 1e3)), FakeStyle()
    async with InferenceHub([FakeWorker("worker")]) as hub:
        tracemalloc.start()
        async with RolloutLoop(
            hub, agent=lambda: EnvironmentAgent(envs=envs, style=style, max_tokens=TOKENS),
            tasks=map(Task, itertools.count()), batch_size=agents, group_size=GROUP, alpha=0,
        ):  # fmt: skip
            await asyncio.sleep(5)
            kilobytes = tracemalloc.get_traced_memory()[0] / 1024
        tracemalloc.stop()
    return kilobytes / agents


def apart(tell: Connection, agents: int, instant: bool, seconds: float) -> None:
    tell.send(run_loop(measure(agents, instant=instant, seconds=seconds)))


def in_its_own_process(agents: int, *, instant: bool, seconds: float) -> Row:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=apart, args=(theirs, agents, instant, seconds))
    process.start()
    theirs.close()  # so that a process that fails ends the wait
    row: Row = ours.recv()
    process.join()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", default="1000,4000,16000")
    parser.add_argument("--seconds", type=float, default=20.0, help="measured, with latencies")
    options = parser.parse_args()
    rows: dict[str, list[Row]] = {}
    for name in ("instant", "latencies"):
        rows[name] = []
        print(
            f"{name:10} agents  episodes/s  requests/s  CPU ms/request  of one core  "
            f"lag p50 ms  p99 ms  KB/agent"
        )
        for agents in map(int, options.agents.split(",")):
            row = in_its_own_process(agents, instant=name == "instant", seconds=options.seconds)
            rows[name].append(row)
            print(
                f"{agents:17}{row['episodes_per_s']:12.0f}{row['requests_per_s']:12.0f}"
                f"{row['cpu_ms_per_request']:16.3f}{row['cpu_share']:13.0%}"
                f"{row['lag_p50_ms']:12.1f}{row['lag_p99_ms']:8.1f}{row['kb_per_agent']:10.1f}",
                flush=True,
            )
    kilobytes = run_loop(allocated(1000))
    print(f"allocated by Python for an agent that waits for its environment: {kilobytes:.1f} KB")
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**rows, "allocated_kb_per_agent": kilobytes}, indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
