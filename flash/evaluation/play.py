"""Plays tasks to their ends with the current policy, trains nothing."""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import numpy as np

from flash.errors import EpisodeFailure, RolloutFailure
from flash.evaluation.config import EvalConfig
from flash.evaluation.result import Evaluation, Score
from flash.rollout.committed import INTERRUPTED
from flash.rollout.crew import AgentCrew, Crew, SessionHub
from flash.rollout.episode import AgentFactories, Episode, EpisodeEnd
from flash.rollout.stall.diagnosis import InspectedHub, stall_of
from flash.seeds import HELDOUT_SEEDS
from flash.types import Task, Trajectory


def heldout_tasks(settings: EvalConfig, task_sets: Iterable[str] = ("",)) -> list[Task]:
    """The same for every run, so that runs can be compared; no run trains on their seeds.

    As many of each task set; a task is there once for each sample of it.
    """
    seeds = HELDOUT_SEEDS[: settings.tasks]
    names = [*task_sets]
    tasks = (Task(seed, task_set=name) for seed in seeds for name in names)
    return [task for task in tasks for _ in range(settings.samples)]


class EvaluationHub(SessionHub, InspectedHub, Protocol):
    """What an evaluation needs of the InferenceHub."""


async def play(
    hub: EvaluationHub,
    agent: AgentFactories,
    tasks: Sequence[Task],
    *,
    concurrency: int,
    max_attempts: int = 3,
    stall_timeout_s: float = 600.0,
    crew: Crew | None = None,
    told: Callable[[Episode, Trajectory | EpisodeFailure], None] = lambda *_: None,
) -> Evaluation:
    """One episode for each task, `concurrency` at a time; failed ones are tried again.

    A `crew` plays in the place of agents of that kind. `told` hears of each episode that came to
    its end, or failed to the last.

    They train nothing, and are in no ledger.

    Raises RolloutFailure if every task fails, RolloutStall if none ends for `stall_timeout_s`, and
    the hub's error if no worker is left.
    """
    clock = asyncio.get_running_loop().time
    started = clock()
    players: Crew = crew or AgentCrew(agent, hub)
    waiting = [(index, task, 1) for index, task in enumerate(tasks)][::-1]
    played: dict[str, list[Trajectory]] = defaultdict(list)  # by task set
    failures: list[EpisodeFailure] = []
    fatal: list[Exception] = []
    running = 0
    progress = asyncio.Event()

    def start_more() -> None:
        nonlocal running
        while waiting and running < concurrency and not fatal:
            index, task, attempt = waiting.pop()
            running += 1
            # Negative, so that no session of an evaluation is one of a training episode.
            players.begin(-1 - index, task, attempt=attempt)

    def on_end(episode: Episode, end: EpisodeEnd) -> None:
        nonlocal running
        running -= 1
        if isinstance(end, Trajectory):
            played[episode.task.task_set].append(end)
            told(episode, end)
        elif isinstance(end, EpisodeFailure) and episode.attempt < max_attempts:
            waiting.append((-1 - episode.id, episode.task, episode.attempt + 1))
        elif isinstance(end, EpisodeFailure):
            failures.append(end)
            told(episode, end)
        elif episode.cancel_reason == INTERRUPTED:
            waiting.append((-1 - episode.id, episode.task, episode.attempt))
        start_more()
        progress.set()

    def on_fatal(error: Exception) -> None:
        fatal.append(error)
        progress.set()

    players.report_to(on_end=on_end, on_fatal=on_fatal)
    async with players:
        try:
            start_more()
            while running and not fatal:
                progress.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(stall_timeout_s):
                        await progress.wait()
                if not (progress.is_set() or players.waits_for):
                    raise stall_of("evaluation", hub, players.episodes(), for_s=stall_timeout_s)
        finally:
            waiting.clear()  # an episode that is cancelled now has no successor
    if fatal:
        raise fatal[0]
    return _evaluation(played, failures, time_s=clock() - started)


def _evaluation(
    played: Mapping[str, Sequence[Trajectory]],
    failures: Sequence[EpisodeFailure],
    *,
    time_s: float,
) -> Evaluation:
    """Of episodes by their task set, and of those that failed to the last."""
    if not played:
        cause = failures[-1] if failures else None
        raise RolloutFailure(f"evaluation: all {len(failures)} tasks failed: {cause}") from cause
    trajectories = [t for of_set in played.values() for t in of_set]
    versions = (s.sampled_versions() for t in trajectories for s in t.sequences)
    whole = _score(trajectories)
    return Evaluation(
        success_rate=whole.success_rate,
        reward_mean=whole.reward_mean,
        turns_mean=float(np.mean([t.turns for t in trajectories])),
        episodes=len(trajectories),
        failed=len(failures),
        time_s=time_s,
        versions=tuple(sorted({int(version) for of_one in versions for version in of_one})),
        task_sets={name: _score(of_set) for name, of_set in played.items() if name},
    )


def _score(trajectories: Sequence[Trajectory]) -> Score:
    return Score(
        success_rate=float(np.mean([t.success for t in trajectories])),
        reward_mean=float(np.mean([t.reward for t in trajectories])),
    )
