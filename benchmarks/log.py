"""The durable log: episodes a second, bytes a token, what the event loop feels of it, and its share
of a run.

    python benchmarks/log.py [--episodes 4000] [--tokens 1000] [--url postgresql://…]
                             [--run alfworld --steps 20]

Episodes come as fast as the log commits them, 64 at a time; meanwhile a timer tells how late the
event loop is. SQLite lies in a folder for temporary files; PostgreSQL is measured where `--url`
names one. None of the episodes is trained: with `log.keep=trained` all tokens go again, with a size
those that are more. With --run a preset is trained, and what its log takes is timed from within:
two whole runs, with a log and without, differ by more than that from each other anyway.
"""

import argparse
import asyncio
import functools
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import uvloop

from flash.config import load
from flash.errors import first_error
from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub
from flash.log.config import ALL, TRAINED
from flash.log.keeping import Keeping
from flash.log.log import Log
from flash.log.store import SQLITE_FILE, Store, sqlite_url
from flash.rollout.episode import Episode
from flash.rollout.observer import Observer
from flash.rollout.record import EpisodeRecord
from flash.train import train
from flash.types import SampledSequence, Task, Trajectory

_AT_ONCE = 64
_TICK_S = 0.001
_TIDY_EVERY = 8  # of these: much more often than a run does


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


async def measure(url: str, episodes: int, tokens: int, keep: str) -> tuple[float, list[float]]:
    """Episodes a second, and how late the event loop was meanwhile."""
    store = Store(url, run=uuid.uuid4().hex, name="benchmark")
    store.own()
    rng = np.random.default_rng(0)
    played = [trajectory(tokens, rng) for _ in range(_AT_ONCE)]
    keeping = Keeping(store, keep, needed_from=lambda: 0)
    log = Log(
        lambda changes: asyncio.to_thread(store.commit, changes),
        tidy=None if keep == ALL else lambda: asyncio.to_thread(keeping.bite),
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
                if number % 8 == 7:
                    log.given_up(episode.group, "stale")
                await asyncio.sleep(0)
            if first // _AT_ONCE % _TIDY_EVERY == 0:
                log.saved(Path(f"step_{first}"))
            await log.committed()
        elapsed_s = time.perf_counter() - began
    store.close()
    return episodes / elapsed_s, late


def shown(name: str, told: tuple[float, list[float]], bytes_a_token: str) -> str:
    rate, late = told
    p50, p99 = np.percentile(late, [50, 99]) * 1000
    return (
        f"{name:18} {rate:10,.0f} {bytes_a_token:>11} {p50:11.1f} {p99:5.1f} {max(late) * 1e3:5.0f}"
    )


# ── its share of a run ───────────────────────────────────────────────────────────────────────


class Share:
    """What a run's log took, in seconds: of its own thread and of the event loop, both of CPU; and
    for how long episodes, and batches, waited for their commits."""

    def __init__(self) -> None:
        self.thread_s = self.loop_s = 0.0
        self.episodes_s: list[float] = []
        self.batches_s: list[float] = []

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Of every log while the block runs."""
        with ExitStack() as patches:
            methods: list[tuple[type, str, str]] = [(Store, "commit", "thread_s")]
            methods += [(Log, name, "loop_s") for name in vars(Observer) if name in vars(Log)]
            for owner, name, kind in methods:
                timed = self._timed(getattr(owner, name), kind)
                patches.enter_context(patch.object(owner, name, timed))
            after_commit, committed = Log.after_commit, Log.committed

            def after(log: Log, then: Callable[[], None]) -> None:
                began_s = time.perf_counter()

                def called() -> None:
                    self.episodes_s.append(time.perf_counter() - began_s)
                    then()

                after_commit(log, called)

            async def wait(log: Log) -> None:
                began_s = time.perf_counter()
                with patch.object(Log, "after_commit", after_commit):
                    await committed(log)
                self.batches_s.append(time.perf_counter() - began_s)

            patches.enter_context(patch.object(Log, "after_commit", after))
            patches.enter_context(patch.object(Log, "committed", wait))
            yield

    def _timed(self, method: Callable[..., Any], kind: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **named: Any) -> Any:
            began_s = time.thread_time()
            try:
                return method(*args, **named)
            finally:
                setattr(self, kind, getattr(self, kind) + time.thread_time() - began_s)

        return timed


def measure_run(preset: str, steps: int) -> str:
    """Trains so many steps, and says what the log took of them."""
    share = Share()
    config = load(preset, {"steps": steps, "name": f"{preset}-log", "eval_every": 0})

    async def run() -> dict[str, Any] | None:
        return await train(config, stop=asyncio.Event())

    with share.measured():
        summary = uvloop.run(run())
    assert summary is not None
    step_s, cores = summary["time_s"] / steps, os.cpu_count() or 1
    episode_s, batch_s = np.median(share.episodes_s), np.median(share.batches_s)
    cpu_s = (share.thread_s + share.loop_s) / steps
    return (
        f"{preset}, {steps} steps of {step_s:.2f} s on {cores} cores\n"
        f"  CPU of the log's thread {share.thread_s / steps:.3f} s a step, of the event loop "
        f"{share.loop_s / steps:.3f} s: {cpu_s / step_s / cores:.1%} of all\n"
        f"  an episode waited {episode_s * 1e3:.0f} ms to count as ready, a batch "
        f"{batch_s * 1e3:.0f} ms to be handed over (medians): {(episode_s + batch_s) / step_s:.1%} "
        f"of a step, where the trainer has nothing else to do"
    )


def _name(database: str, keep: str) -> str:
    return database if keep == ALL else f"  keep {keep}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=4000)
    parser.add_argument("--tokens", type=int, default=1000, help="of an episode")
    parser.add_argument("--url", help="of a PostgreSQL database")
    parser.add_argument("--run", metavar="PRESET", help="to be trained, in its folder under runs/")
    parser.add_argument("--steps", type=int, default=20, help="of that run")
    options = parser.parse_args()
    tokens = options.episodes * options.tokens
    half = f"{2.5 * tokens / 1e6:.1f} MB"

    def run(url: str, keep: str = ALL) -> tuple[float, list[float]]:
        return uvloop.run(measure(url, options.episodes, options.tokens, keep))

    print("log                episodes/s bytes/token late p50 ms   p99   max")
    for keep in (ALL, TRAINED, half):
        with tempfile.TemporaryDirectory() as folder:
            told = run(sqlite_url(Path(folder)), keep)
            size = (Path(folder) / SQLITE_FILE).stat().st_size
            print(shown(_name("SQLite", keep), told, f"{size / tokens:.1f}"))
    for keep in (ALL, TRAINED, half) if options.url else ():
        print(shown(_name("PostgreSQL", keep), run(options.url, keep), "-"))
    if options.run:
        print(measure_run(options.run, options.steps))


if __name__ == "__main__":
    main()
