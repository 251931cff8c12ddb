"""What explorers cost their controller: episodes a second, and its CPU time for each of them.

    here        the agents are in the controller's process, as without explorers
    N explorers they are in N other processes, over connections on loopback

The production's RolloutLoop, Fleet, gate, links and players, with the fakes of `flash.fakes` for
workers (no latency, called in the process in which the agents are: no HTTP) and environments:
episodes of five turns, 16 tokens a response, batches of 256 in groups of 8, a trainer that trains
nothing and publishes at once. CPU time is of the controller's process alone. As `most`, the rate
at which that takes one whole core.

    python benchmarks/explorers.py [--explorers 1,2,4] [--seconds 10]
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp

from flash.agents import EnvironmentAgent
from flash.cli.event_loop import run_loop
from flash.explorer.connection import Connection, RunIsOver
from flash.explorer.crew import FleetCrew
from flash.explorer.file_server import FileServer
from flash.explorer.fleet import Fleet, Run
from flash.explorer.gate import Gate, joined
from flash.explorer.hub import FleetHub
from flash.explorer.link import Wire
from flash.explorer.messages import Files
from flash.explorer.player import Player
from flash.explorer.playing import play
from flash.explorer.spool import Spool
from flash.fakes import FakeEnvs, FakeStyle, FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.config import RolloutSettings
from flash.rollout.crew import AgentCrew, Crew
from flash.rollout.loop import RolloutHub, RolloutLoop
from flash.types import Task, Weights

RESULTS = Path(__file__).parent / "results" / "explorers.json"
TURNS, TOKENS, GROUP, BATCH, WORKERS, RUNNING = 5, 16, 8, 256, 4, 64
TOKEN = "benchmark"

Row = dict[str, float]


def agent() -> EnvironmentAgent:
    envs = FakeEnvs(turns=(TURNS, TURNS), step_s=(0.0, 0.0))
    return EnvironmentAgent(envs=envs, style=FakeStyle(), max_tokens=TOKENS)


def workers_hub() -> InferenceHub:
    fixed = {"token_s": (0.0, 0.0), "tokens": (TOKENS, TOKENS), "load_s": (0.0, 0.0)}
    workers = [FakeWorker(f"worker {i}", seed=i, **fixed) for i in range(WORKERS)]  # type: ignore[arg-type]
    return InferenceHub(workers, max_running=RUNNING)


async def nothing(files: Files) -> Path:
    return Path(files.path)


async def offered(folder: Path, *, before: Files | None = None) -> Files:
    return Files(path=str(folder), stamp="", key="")


async def measured(hub: RolloutHub, crew: Crew, seconds: float) -> Row:
    """Trains nothing for so long, after a while to warm up."""
    async with RolloutLoop(
        hub,
        crew=crew,
        tasks=map(Task, itertools.count()),
        batch_size=BATCH,
        group_size=GROUP,
        alpha=3,
        settings=RolloutSettings(on_stale="drop"),
    ) as rollouts:

        async def train(until: float) -> int:
            episodes = 0
            while time.perf_counter() < until:
                batch = await rollouts.next_batch()
                episodes += len(batch.samples)
                await rollouts.publish(Weights(version=batch.version + 1, path=Path("/none")))
            return episodes

        await train(time.perf_counter() + seconds / 3)
        began, cpu = time.perf_counter(), time.process_time()
        episodes = await train(began + seconds)
        took, used = time.perf_counter() - began, time.process_time() - cpu
    return {
        "episodes_per_s": episodes / took,
        "cpu_ms": 1000 * used / episodes,
        "core_share": used / took,
        "most_per_s": episodes / used,
    }


async def here(seconds: float) -> Row:
    async with workers_hub() as hub:
        return await measured(hub, AgentCrew(agent, hub), seconds)


async def with_explorers(number: int, seconds: float) -> Row:
    hub = FleetHub(None, version=0, offer=offered)
    run = Run(id="run", name="run", config={}, where="here", model="", model_files=None, version=0)
    fleet = Fleet(run, lease_s=60, version=lambda: hub.version, publish=lambda: hub.message)
    hub.over(fleet)
    async with fleet, FileServer() as files:
        gate = Gate(TOKEN, fleet.welcome, files=files, host="127.0.0.1", port=0)
        url = await gate.start()
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=explorer, args=(url, f"explorer {n}")) for n in range(number)
        ]
        for process in processes:
            process.start()
        try:
            while len(fleet.explorers) < number or fleet.placing.waits_for():  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            return await measured(hub, FleetCrew(fleet, hub), seconds)
        finally:
            await fleet.close("measured", again=False)
            await gate.close()
            for process in processes:
                await asyncio.to_thread(process.join, 10)
                process.kill()


def explorer(url: str, name: str) -> None:
    run_loop(_explore(url, name))


async def _explore(url: str, name: str) -> None:
    async with aiohttp.ClientSession() as session:

        @contextlib.asynccontextmanager
        async def connect() -> AsyncIterator[Wire]:
            async with joined(session, url, TOKEN) as wire:
                yield wire

        spool = Spool(Path(tempfile.gettempdir()) / "flash-benchmark-spool")
        player = Player(spool)
        connection = Connection(name, player, connect=connect, have=nothing, say=lambda _: None)
        with contextlib.suppress(RunIsOver):
            async with connection.kept():
                await connection.welcomed()
                async with workers_hub() as hub:
                    await play(
                        player,
                        connection,
                        hub,
                        AgentCrew(agent, hub),
                        AgentCrew(agent, hub),
                        stop=asyncio.Event(),
                        drain_s=0,
                        say=lambda _: None,
                    )
        await spool.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--explorers", default="1,2,4")
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    rows: dict[str, Row] = {"here": run_loop(here(options.seconds))}
    for number in map(int, options.explorers.split(",")):
        rows[f"{number} explorers"] = run_loop(with_explorers(number, options.seconds))
    base = rows["here"]["cpu_ms"]
    print(f"{'':14}{'episodes/s':>12}{'CPU ms/ep.':>12}{'of here':>10}{'most/s':>10}{'core':>8}")
    for name, row in rows.items():
        print(
            f"{name:14}{row['episodes_per_s']:12,.0f}{row['cpu_ms']:12.3f}"
            f"{row['cpu_ms'] / base:10.2f}{row['most_per_s']:10,.0f}{row['core_share']:8.0%}"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
