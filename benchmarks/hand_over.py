"""What the end of an episode, and the hand-over of a batch, cost the event loop.

    python benchmarks/hand_over.py [--samples 4096] [--tokens 1000]

An episode's tokens become arrays at its end. A batch of as many samples, each an episode of as many
tokens, is handed over by a RolloutLoop that has four batches ready, with a run's files and its log
(which writes nothing) and without: CPU time in all, and that of the longest turn of the event loop.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Sequence

from flash.cli.event_loop import run_loop
from flash.config import load
from flash.conversation import TokenSequence
from flash.fakes import FakeCrew, FakeWorker
from flash.hub.hub import InferenceHub
from flash.log.log import Log
from flash.log.store import Change
from flash.rollout.committed import CommitLog
from flash.rollout.episode import Episode
from flash.rollout.loop import RolloutLoop
from flash.rollout.observer import Observer
from flash.telemetry.folder import RunFolder
from flash.types import Completion, SampledSequence, Task, Trajectory

TURNS, GROUP, ALPHA = 8, 8, 3


def completion(tokens: int) -> Completion:
    return Completion(
        token_ids=[random.randrange(150_000) for _ in range(tokens)],
        logprobs=[-random.random() for _ in range(tokens)],
        versions=[0] * tokens,
        temperature=1.0,
        finish_reason="stop",
    )


def conversation(said: Sequence[Completion]) -> SampledSequence:
    """Half of its tokens were read."""
    sequence = TokenSequence([])
    for answer in said:
        sequence.add_prompt(answer.token_ids)
        sequence.add_sampled(answer)
    return sequence.snapshot()


def episode_ms(tokens: int) -> float:
    """From lists to arrays."""
    said = [completion(tokens // TURNS // 2) for _ in range(TURNS)]
    took = []
    for _ in range(50):
        began = time.thread_time()
        conversation(said)
        took.append(time.thread_time() - began)
    return 1000 * statistics.median(took)


class Counting(Observer):
    """`done` once so many episodes were played."""

    def __init__(self, episodes: int) -> None:
        self.done = asyncio.Event()
        self._left = episodes

    def played(self, episode: Episode) -> None:
        self._left -= 1
        if self._left == 0:
            self.done.set()


async def hand_over(
    samples: int, tokens: int, observers: Sequence[Observer] = (), log: CommitLog | None = None
) -> tuple[float, float]:
    """CPU milliseconds of all of it, and of its longest turn."""
    said = conversation([completion(tokens // TURNS // 2) for _ in range(TURNS)])
    played = Trajectory(sequences=[said], reward=1.0, turns=TURNS)
    counting = Counting((1 + ALPHA) * samples)
    async with InferenceHub([FakeWorker("worker")]) as hub:
        crew = FakeCrew(hub, lambda episode: played)
        async with RolloutLoop(
            hub, crew=crew, tasks=map(Task, itertools.count()), batch_size=samples,
            group_size=GROUP, alpha=ALPHA, observers=[*observers, counting], log=log,
        ) as rollouts:  # fmt: skip
            await counting.done.wait()
            await asyncio.sleep(1.0)  # what was told of them is written
            turns = []
            taking = asyncio.ensure_future(rollouts.next_batch())
            while not taking.done():
                began = time.thread_time()
                await asyncio.sleep(0)
                turns.append(1000 * (time.thread_time() - began))
            await taking
    return sum(turns), max(turns)


async def with_files(samples: int, tokens: int) -> tuple[float, float]:
    async def commit(changes: Sequence[Change]) -> None:
        pass

    with (
        tempfile.TemporaryDirectory() as runs,
        RunFolder(load("frozen_lake", {"runs_dir": runs})) as folder,
    ):
        log = Log(commit, start=1, now=time.time, max_lag_s=60, timeout_s=60)
        async with log:
            return await hand_over(samples, tokens, [log, folder], log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=1000, help="of an episode")
    options = parser.parse_args()
    print("tokens of an episode  ms to arrays")
    for tokens in (1024, 8192, 32_768):
        print(f"{tokens:20}{episode_ms(tokens):14.2f}")
    print(f"\nhand-over of {options.samples} samples  CPU ms  longest turn ms")
    for name, measured in (("alone", hand_over), ("with log and files", with_files)):
        whole, longest = run_loop(measured(options.samples, options.tokens))
        print(f"{name:28}{whole:8.0f}{longest:17.1f}")


if __name__ == "__main__":
    main()
