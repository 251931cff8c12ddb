"""What ever more explorers, and episodes in flight, cost one controller; and where it is full.

    explorers   1 to 64 of them, with 16,384 episodes in flight between them
    in flight   8 explorers, with ever more episodes between them
    pace        8 explorers with 16,384 episodes, which take ever less time
    tokens      8 explorers with 16,384 episodes, with longer responses

The production's RolloutLoop, FleetCrew, Fleet and links in one process, and in another one all
explorers: the production's players, agents and hubs over the fakes of `flash.fakes`. Episodes have
five turns of 16 tokens; a response takes 4 s and a step 1.25 s, as drawn; `pace` says how many
times faster. Explorers are full, and as many episodes as they play wait at the controller.

The two processes have one virtual clock: a frame takes 10 ms from one to the other, and neither is
ever further than that ahead. The controller's clock goes on while it works, too, so it is late
where a real one would be: `lag` is how late it sees a frame (on a quiet machine), `core` the share
of the time in which it works. Frames are encoded and decoded, but come over a pipe, which is not
counted; what a connection costs for each frame is measured apart, and is part of `with sockets`.
As `most`, the episodes a second at which all that takes one core.

    python benchmarks/scaling.py [--only explorers,pace] [--batches 4]
"""

import argparse
import asyncio
import gc
import itertools
import json
import logging
import multiprocessing
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import aiohttp
import msgspec
from explorers import nothing, offered
from hub import percentile

from flash.agents import EnvironmentAgent
from flash.cli.event_loop import run_loop
from flash.explorer.connection import Connection
from flash.explorer.crew import FleetCrew
from flash.explorer.file_server import FileServer
from flash.explorer.fleet import Fleet, Run
from flash.explorer.gate import Gate, joined
from flash.explorer.hub import FleetHub
from flash.explorer.link import Wire
from flash.explorer.player import Player
from flash.explorer.playing import play
from flash.explorer.spool import Spool
from flash.fakes import FakeEnvs, FakeStyle, FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.config import RolloutSettings
from flash.rollout.crew import AgentCrew
from flash.rollout.loop import RolloutLoop
from flash.simulate.distributions import Distribution
from flash.types import Task, Weights
from flash.virtual_time import VirtualTimeLoop

RESULTS = Path(__file__).parent / "results" / "scaling.json"
TURNS, GROUP, ALPHA, WORKERS = 5, 8, 7, 4
# Twice as many may be: what is slow grows not too old, and explorers are full.
BATCHES_IN_FLIGHT = 4
RESPONSE_S = Distribution(kind="lognormal", mean=4.0, sigma=0.5).sampler()
STEP_S = (0.5, 2.0)
RESPONDING = 20.0 / 27.5  # the share of an episode's time
FRAME_S = 0.01
SOCKET_FRAMES = 20_000

Row = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is measured, for so many batches of a quarter of what is in flight."""

    explorers: int = 8
    in_flight: int = 16_384
    pace: float = 1.0
    tokens: int = 16
    batches: int = 4


BASE = Case()
TABLES = {
    "explorers": [replace(BASE, explorers=number) for number in (1, 2, 4, 8, 16, 32, 64)],
    "in flight": [replace(BASE, in_flight=number) for number in (1024, 4096, 16_384, 65_536)],
    "pace": [replace(BASE, pace=pace) for pace in (1.0, 4.0, 8.0, 16.0)],
    "tokens": [replace(BASE, tokens=tokens) for tokens in (16, 256)],
}


# ── two processes with one clock ─────────────────────────────────────────────────────────────


class SharedClockLoop(VirtualTimeLoop):
    """The event loop of one of the two; with `works` its clock goes on while it works, too.

    All wires are there from the start, for what the other side sends before this one has begun.
    """

    def __init__(self, pipe: Pipe, *, wires: int, works: bool) -> None:
        super().__init__()
        self.wires = [PipeWire(self, number) for number in range(wires)]
        self.outbox: list[tuple[float, int, bytes]] = []
        self.cpu_s = 0.0
        self._pipe = pipe
        self._works = works
        self._until = 0.0  # nothing of the other side's can come before
        self._works_since = time.perf_counter()
        self._cpu_since = time.thread_time()

    def jump(self, *, idle: bool) -> bool:
        if self._works:
            self._now += time.perf_counter() - self._works_since
        while (at := self._goes_on_at(idle)) >= self._until:
            self.cpu_s += time.thread_time() - self._cpu_since
            self._meet(at)
            self._cpu_since = time.thread_time()
        self._works_since = time.perf_counter()
        return super().jump(idle=idle)

    def _goes_on_at(self, idle: bool) -> float:
        return max(self._now, self.next_timer_at()) if idle else self._now

    def _meet(self, at: float) -> None:
        """Tells what was sent, and when this side goes on; hears likewise."""
        sent, self.outbox = self.outbox, []
        self._pipe.send((at, sent))
        theirs_at, received = self._pipe.recv()
        for arrives_at, wire, frame in received:
            self.call_at(arrives_at, self.wires[wire].arrive, arrives_at, frame)
        arrivals = [arrives_at for arrives_at, _, _ in (*sent, *received)]
        self._until = min(at, theirs_at, *arrivals) + FRAME_S
        for _, wire, frame in sent:
            self.wires[wire].count("sent", frame)
        for _, wire, frame in received:
            self.wires[wire].count("received", frame)


class PipeWire:
    """One end of a connection between the two."""

    local_address = "127.0.0.1"

    def __init__(self, loop: SharedClockLoop, number: int) -> None:
        self.counts: Counter[str] = Counter()
        self.lags: list[float] = []
        self._loop = loop
        self._number = number
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()

    async def send(self, frame: bytes) -> None:
        self._loop.outbox.append((self._loop.time() + FRAME_S, self._number, frame))

    def arrive(self, arrives_at: float, frame: bytes) -> None:
        self.lags.append(self._loop.time() - arrives_at)
        self._frames.put_nowait(frame)

    async def receive(self) -> bytes:
        return await self._frames.get()

    async def close(self) -> None:
        """Both end with their processes."""

    def count(self, way: str, frame: bytes) -> None:
        self.counts["frames"] += 1
        self.counts[f"bytes {way}"] += len(frame)
        self.counts[f"messages {way}"] += len(msgspec.msgpack.decode(frame)[1])


def in_two_processes(case: Case) -> Row:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    hear, tell = context.Pipe(duplex=False)
    processes = [
        context.Process(target=controller, args=(ours, tell, case)),
        context.Process(target=explorers, args=(theirs, case)),
    ]
    for process in processes:
        process.start()
    for end in (ours, theirs, tell):
        end.close()  # so that a process that fails ends the wait
    try:
        row: Row = hear.recv()
    finally:
        for process in processes:  # before one of them hears of the other's end
            process.kill()
        for process in processes:
            process.join()
    return row


# ── the controller ───────────────────────────────────────────────────────────────────────────


def controller(pipe: Pipe, tell: Pipe, case: Case) -> None:
    gc.disable()  # as `run_loop`
    logging.disable(logging.WARNING)  # the first episodes are quick: they wait for no explorer
    loop = SharedClockLoop(pipe, wires=case.explorers, works=True)
    loop.run_until_complete(_control(loop, tell, case))


async def _control(loop: SharedClockLoop, tell: Pipe, case: Case) -> None:
    hub = FleetHub(None, version=0, offer=offered)
    run = Run(id="run", name="run", config={}, where="here", model="", model_files=None, version=0)
    fleet = Fleet(run, lease_s=60, version=lambda: hub.version, publish=lambda: hub.message)
    hub.over(fleet)
    async with fleet, asyncio.TaskGroup() as tasks:
        for wire in loop.wires:
            tasks.create_task(fleet.welcome(wire))
        async with RolloutLoop(
            hub,
            crew=FleetCrew(fleet, hub),
            tasks=map(Task, itertools.count()),
            batch_size=case.in_flight // BATCHES_IN_FLIGHT // GROUP * GROUP,
            group_size=GROUP,
            alpha=ALPHA,
            settings=RolloutSettings(on_stale="wait"),
        ) as rollouts:
            await _train(rollouts, 2 * BATCHES_IN_FLIGHT)  # until they are out of step
            before = _sums(loop)
            for wire in loop.wires:
                wire.lags.clear()
            episodes = await _train(rollouts, case.batches)
            now = _sums(loop)
            lags = [lag for wire in loop.wires for lag in wire.lags]
            tell.send(_row(episodes, {name: now[name] - before[name] for name in now}, lags))
            await asyncio.Event().wait()  # for its end


async def _train(rollouts: RolloutLoop, batches: int) -> int:
    episodes = 0
    for _ in range(batches):
        batch = await rollouts.next_batch()
        await rollouts.publish(Weights(version=batch.version + 1, path=Path("/none")))
        episodes += len(batch.samples)
    return episodes


def _sums(loop: SharedClockLoop) -> dict[str, float]:
    """Since the start."""
    counts: Counter[str] = sum((wire.counts for wire in loop.wires), Counter())
    return {"time_s": loop.time(), "cpu_s": loop.cpu_s, **counts}


def _row(episodes: int, took: dict[str, float], lags: list[float]) -> Row:
    return {
        "episodes_per_s": episodes / took["time_s"],
        "cpu_ms": 1000 * took["cpu_s"] / episodes,
        "core_share": took["cpu_s"] / took["time_s"],
        "frames": took["frames"] / episodes,
        "frame_bytes": (took["bytes sent"] + took["bytes received"]) / took["frames"],
        "messages_sent": took["messages sent"] / episodes,
        "messages_received": took["messages received"] / episodes,
        "kb_sent": took["bytes sent"] / 1024 / episodes,
        "kb_received": took["bytes received"] / 1024 / episodes,
        "lag_p50_ms": 1000 * percentile(lags, 50),
        "lag_p99_ms": 1000 * percentile(lags, 99),
        "lag_max_ms": 1000 * max(lags),
    }


# ── the explorers ────────────────────────────────────────────────────────────────────────────


def explorers(pipe: Pipe, case: Case) -> None:
    gc.disable()
    loop = SharedClockLoop(pipe, wires=case.explorers, works=False)
    loop.run_until_complete(_explore(loop, case))


async def _explore(loop: SharedClockLoop, case: Case) -> None:
    async with asyncio.TaskGroup() as tasks:
        for number, wire in enumerate(loop.wires):
            tasks.create_task(_explorer(number, wire, case))


async def _explorer(number: int, wire: Wire, case: Case) -> None:
    @asynccontextmanager
    async def connect() -> AsyncIterator[Wire]:
        yield wire

    workers = [
        FakeWorker(
            f"worker {worker}",
            seed=WORKERS * number + worker,
            token_s=lambda rng: RESPONSE_S.draw(rng) / case.pace / case.tokens,
            tokens=(case.tokens, case.tokens),
            load_s=(0.0, 1.0 / case.pace),
        )
        for worker in range(WORKERS)
    ]
    envs = FakeEnvs(
        seed=number,
        turns=(TURNS, TURNS),
        step_s=(STEP_S[0] / case.pace, STEP_S[1] / case.pace),
    )

    def agent() -> EnvironmentAgent:
        return EnvironmentAgent(envs=envs, style=FakeStyle(), max_tokens=case.tokens)

    player = Player(Spool(Path("nothing is written")))  # its links last
    connection = Connection(
        f"explorer {number}", player, connect=connect, have=nothing, say=lambda _: None
    )
    running = max(1, round(RESPONDING * case.in_flight / case.explorers / WORKERS))
    async with connection.kept():
        await connection.welcomed()
        async with InferenceHub(workers, max_running=running) as hub:
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


# ── sockets ──────────────────────────────────────────────────────────────────────────────────


async def socket_frame_s(size: int) -> float:
    """CPU time of a frame of that size, sent or received by itself: half of both, on loopback."""
    frame, arrived = bytes(size), asyncio.Event()

    async def welcome(wire: Wire) -> None:
        for _ in range(SOCKET_FRAMES):
            await wire.receive()
            arrived.set()

    async with FileServer() as files, aiohttp.ClientSession() as session:
        gate = Gate("token", welcome, files=files, host="127.0.0.1", port=0)
        url = await gate.start()
        async with joined(session, url, "token") as wire:
            began = time.process_time()
            for _ in range(SOCKET_FRAMES):
                await wire.send(frame)
                await arrived.wait()
                arrived.clear()
            took_s = time.process_time() - began
        await gate.close()
    return took_s / 2 / SOCKET_FRAMES


# ── tables ───────────────────────────────────────────────────────────────────────────────────


def measured(case: Case) -> Row:
    row = in_two_processes(case)
    socket_s = run_loop(socket_frame_s(round(row["frame_bytes"])))
    row["with_sockets_ms"] = row["cpu_ms"] + 1000 * socket_s * row["frames"]
    row["most_per_s"] = 1000 / row["with_sockets_ms"]
    return row


def shown(case: Case, row: Row) -> str:
    return (
        f"{case.explorers:9}{case.in_flight:11,}{case.pace:6g}{case.tokens:8}"
        f"{row['episodes_per_s']:12,.0f}{row['core_share']:7.0%}{row['cpu_ms']:12.3f}"
        f"{row['with_sockets_ms']:14.3f}{row['most_per_s']:9,.0f}{row['frames']:8.1f}"
        f"{row['messages_sent'] + row['messages_received']:10.1f}"
        f"{row['kb_sent'] + row['kb_received']:7.1f}"
        f"{row['lag_p99_ms']:12.1f}{row['lag_max_ms']:6.0f}"
    )


HEADER = (
    "explorers  in flight  pace  tokens  episodes/s   core  CPU ms/ep.  with sockets   most/s"
    "  frames  messages     KB  lag p99 ms   max"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(TABLES))
    parser.add_argument("--batches", type=int, default=BASE.batches)
    options = parser.parse_args()
    rows: dict[Case, Row] = {}
    for name in options.only.split(","):
        print(f"{name}\n{HEADER}")
        for case in TABLES[name]:
            if case not in rows:
                rows[case] = measured(replace(case, batches=options.batches))
            print(shown(case, rows[case]), flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    results = [asdict(case) | row for case, row in rows.items()]
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
