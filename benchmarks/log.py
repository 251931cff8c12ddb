"""The durable log: episodes a second, bytes a token, and what the event loop feels of it.

    python benchmarks/log.py [--episodes 4000] [--tokens 1000] [--url postgresql://…]

Episodes come as fast as the log commits them, 64 at a time; meanwhile a timer tells how late the
event loop is. SQLite lies in a folder for temporary files; PostgreSQL is measured where `--url`
names one.
"""

import argparse
import asyncio
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import uvloop

from flash.errors import first_error
from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub
from flash.log.log import Log
from flash.log.store import SQLITE_FILE, Store, sqlite_url
from flash.rollout.episode import Episode
from flash.rollout.record import EpisodeRecord
from flash.types import SampledSequence, Task, Trajectory

_AT_ONCE = 64
_TICK_S = 0.001


def trajectory(tokens: int, rng: np.random.Generator) -> Trajectory:
    """Of ten turns; two thirds of its tokens are sampled."""
    turns = np.arange(tokens) * 10 // tokens
    sampled = np.arange(tokens) % (tokens // 10) > tokens // 30
    sequence = SampledSequence(
        token_ids=rng.zipf(1.3, tokens).clip(0, 150_000),
        loss_mask=sampled.astype(np.float32),
        logprobs=np.where(sampled, -rng.exponential(0.5, tokens), 0).astype(np.float32),
        versions=np.where(sampled, 37, -1),
        temperatures=np.ones(tokens, np.float32),
        turns=np.where(sampled, turns, -1),
    )
    states = [f"turn {turn}" for turn in range(10)]
    return Trajectory(
        sequences=[sequence], reward=1.0, turns=10, turn_rewards=[0.0] * 10, turn_states=states
    )


@asynccontextmanager
async def lateness() -> AsyncIterator[list[float]]:
    """How late the event loop is, in seconds, each millisecond of the block."""
    late: list[float] = []

    async def tick() -> None:
        while True:
            due = time.perf_counter() + _TICK_S
            await asyncio.sleep(_TICK_S)
            late.append(time.perf_counter() - due)

    with first_error():
        async with asyncio.TaskGroup() as tasks:
            ticking = tasks.create_task(tick())
            yield late
            ticking.cancel()


async def measure(url: str, episodes: int, tokens: int) -> tuple[float, list[float]]:
    """Episodes a second, and how late the event loop was meanwhile."""
    store = Store(url, run=uuid.uuid4().hex, name="benchmark")
    store.own()
    rng = np.random.default_rng(0)
    played = [trajectory(tokens, rng) for _ in range(_AT_ONCE)]
    log = Log(
        lambda changes: asyncio.to_thread(store.commit, changes),
        start=1,
        now=time.time,
        max_lag_s=60,
        timeout_s=60,
    )
    hub = InferenceHub([FakeWorker("w")])
    async with log, lateness() as late:
        began = time.perf_counter()
        for first in range(0, episodes, _AT_ONCE):
            for number, ending in enumerate(played[: episodes - first], start=first):
                episode = Episode(number, Task(number), hub=hub, group=number // 8)
                log.admitted(episode)
                episode.finish(ending)
                log.played(episode)
                log.ended(episode, EpisodeRecord.of(episode, "dropped", "stale"))
                await asyncio.sleep(0)
            await log.committed()
        elapsed_s = time.perf_counter() - began
    store.close()
    return episodes / elapsed_s, late


def shown(name: str, told: tuple[float, list[float]], bytes_a_token: str) -> str:
    rate, late = told
    p50, p99 = np.percentile(late, [50, 99]) * 1000
    return (
        f"{name:10} {rate:10,.0f} {bytes_a_token:>11} {p50:11.1f} {p99:5.1f} {max(late) * 1e3:5.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=1000, help="of an episode")
    parser.add_argument("--url", help="of a PostgreSQL database")
    options = parser.parse_args()
    run: Callable[[str], tuple[float, list[float]]] = lambda url: uvloop.run(  # noqa: E731
        measure(url, options.episodes, options.tokens)
    )
    print("log        episodes/s bytes/token late p50 ms   p99   max")
    with tempfile.TemporaryDirectory() as folder:
        told = run(sqlite_url(Path(folder)))
        size = (Path(folder) / SQLITE_FILE).stat().st_size
        print(shown("SQLite", told, f"{size / options.episodes / options.tokens:.1f}"))
    if options.url:
        print(shown("PostgreSQL", run(options.url), "-"))


if __name__ == "__main__":
    main()
