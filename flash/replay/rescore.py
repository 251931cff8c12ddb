"""What another reward would have made of episodes that were played.

    log ─► pages of episodes ─► Transcript ─► the function ─► before and after, group by group

A coroutine function is called in this process, any other one in processes, as in a run.
"""

import asyncio
import contextlib
import inspect
import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace

from flash import registry
from flash.errors import RewardFailure
from flash.explorer.brought import brought_value
from flash.replay.episodes import LoggedEpisode
from flash.replay.logged_run import LoggedRun
from flash.replay.text import Decoder
from flash.reward.processes import RewardProcesses
from flash.reward.stage import FunctionScorer, Scorer, scored, transcript_of
from flash.system.own_logs import own_logs
from flash.types import Trajectory

_PAGE = 16  # episodes that are read, and scored, at a time: as a run does by default
_PROCESSES = 2
_TIMEOUT_S = 60.0  # for one episode
_LARGEST = 10
_NO_SPREAD = 1e-8  # below it a group tells nothing, as in flash/trainer/advantages.py


@dataclass(frozen=True, slots=True)
class Change:
    """An episode's reward, as it was and as it would have been."""

    episode: int
    group: int
    before: float
    after: float

    @property
    def size(self) -> float:
        return abs(self.after - self.before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """What would have changed. `groups` are those of two episodes or more; in `lost` all rewards
    became equal, in `gained` they ceased to be. `largest` are the largest changes first."""

    episodes: int
    gone: int  # of which the log has no tokens any more
    failed: int
    why_failed: str  # the first of them
    mean_before: float
    mean_after: float
    changed: int
    groups: int
    lost: Sequence[int]
    gained: Sequence[int]
    largest: Sequence[Change]


class _Span:
    """From the least to the greatest reward of a group."""

    def __init__(self) -> None:
        self._least, self._greatest = math.inf, -math.inf

    def add(self, reward: float) -> None:
        self._least, self._greatest = min(self._least, reward), max(self._greatest, reward)

    @property
    def is_nothing(self) -> bool:
        return self._greatest - self._least < _NO_SPREAD


class _Group:
    def __init__(self) -> None:
        self.episodes = 0
        self.before, self.after = _Span(), _Span()

    def add(self, change: Change) -> None:
        self.episodes += 1
        self.before.add(change.before)
        self.after.add(change.after)


async def rescore(run: LoggedRun, function: str, decode: Decoder) -> Rescored:
    """Scores every episode that came to its end. One whose reward fails, or that has gone from the
    log, is counted and left out.

    ValueError for what can't be a reward, or if there is nothing to score; RewardFailure if each
    one fails.
    """
    groups: dict[int, _Group] = {}
    largest: list[Change] = []
    episodes = changed = failed = gone = 0
    sum_before = sum_after = 0.0
    why_failed = ""
    async with (
        _scorer(function) as scorer,
        contextlib.aclosing(_changes(run, scorer, decode)) as changes,
    ):
        async for change in changes:
            if change is None:
                gone += 1
                continue
            if isinstance(change, str):
                failed += 1
                why_failed = why_failed or change
                continue
            episodes += 1
            sum_before += change.before
            sum_after += change.after
            groups.setdefault(change.group, _Group()).add(change)
            if change.size:
                changed += 1
                largest = sorted([*largest, change], key=_largest_first)[:_LARGEST]
    if failed and not episodes:
        raise RewardFailure(f"the reward failed for each of {failed} episodes: {why_failed}")
    if gone and not episodes:
        raise ValueError(
            f"the tokens of all {gone} episodes of {run.path} are no longer in the log (log.keep): "
            f"nothing to score"
        )
    if not episodes:
        raise ValueError(f"{run.path} has no episode that came to its end: nothing to score")
    compared = {number: group for number, group in groups.items() if group.episodes > 1}
    return Rescored(
        episodes=episodes,
        gone=gone,
        failed=failed,
        why_failed=why_failed,
        mean_before=sum_before / episodes,
        mean_after=sum_after / episodes,
        changed=changed,
        groups=len(compared),
        lost=[n for n, g in compared.items() if g.after.is_nothing and not g.before.is_nothing],
        gained=[n for n, g in compared.items() if g.before.is_nothing and not g.after.is_nothing],
        largest=largest,
    )


def table(rescored: Rescored, function: str) -> str:
    """To be read."""
    r = rescored
    lines = [
        f"{function} on {r.episodes} episodes, trained or not",
        f"{'mean reward':24}{r.mean_before:.4g} → {r.mean_after:.4g}",
        f"{'episodes changed':24}{r.changed} of {r.episodes}",
        f"{'groups that lost spread':24}{_of_groups(r.lost, r.groups)}",
        f"{'groups that gained it':24}{_of_groups(r.gained, r.groups)}",
    ]
    if r.gone:
        lines.append(f"{'no longer in the log':24}{r.gone}, and left out (log.keep)")
    if r.failed:
        lines.append(f"{'failed, and left out':24}{r.failed}, the first: {r.why_failed}")
    if r.largest:
        lines += ["", f"{'episode':>8} {'group':>8} {'before':>10} {'after':>10} {'change':>10}"]
        lines += [
            f"{c.episode:8} {c.group:8} {c.before:10.4g} {c.after:10.4g} "
            f"{c.after - c.before:+10.4g}"
            for c in r.largest
        ]
    return "\n".join(lines)


@contextlib.asynccontextmanager
async def _scorer(name: str) -> AsyncIterator[Scorer]:
    function = registry.function(name, "--rescore", of="the episode (flash.types.Transcript)")
    if inspect.iscoroutinefunction(function):
        yield FunctionScorer(function)
        return
    with own_logs("flash-rescore-") as log_dir:
        async with RewardProcesses(name, processes=_PROCESSES, log_dir=log_dir) as processes:
            yield processes


async def _changes(
    run: LoggedRun, scorer: Scorer, decode: Decoder
) -> AsyncGenerator[Change | str | None, None]:
    """Of each episode, in the order of their numbers; or why its reward failed; None of one that
    the log has no tokens of any more."""

    async def change(episode: LoggedEpisode) -> Change | str | None:
        if episode.is_gone:
            return None
        played = _as_played(episode, _has_reward_of_env(run, episode.task.task_set))
        transcript = transcript_of(episode.task, played, decode)
        try:
            reward, _ = await scored(scorer, transcript, timeout_s=_TIMEOUT_S)
        except RewardFailure as failure:
            return f"episode {episode.episode}: {failure}"
        assert episode.reward is not None
        return Change(episode.episode, episode.group, episode.reward, reward)

    after = -1
    while page := await asyncio.to_thread(_page, run, after):
        after = page[-1].episode
        async with asyncio.TaskGroup() as tasks:
            of_page = [
                tasks.create_task(change(episode), name=f"score episode {episode.episode}")
                for episode in page
            ]
        for task in of_page:
            yield task.result()


def _page(run: LoggedRun, after: int) -> list[LoggedEpisode]:
    with run.reading() as reader:
        return reader.page("played", after=after, most=_PAGE)


def _has_reward_of_env(run: LoggedRun, task_set: str) -> bool:
    of_set = run.config.get("task_sets", {}).get(task_set, {})
    reward = of_set.get("reward", run.config.get("reward", {}))
    name = reward.get("name", "env")
    if of_set.get("brought"):
        name = brought_value(run.path, task_set, "reward.name") or name
    return bool(name == "env")


def _as_played(episode: LoggedEpisode, of_env: bool) -> Trajectory:
    """As a reward stage is given it. Where the run had one, its reward took the place of the
    environment's, which its observations still tell."""
    trajectory = episode.trajectory
    assert trajectory is not None
    if of_env or not episode.seen:
        return trajectory
    reward = sum(seen.observation.reward for seen in episode.seen)
    success = bool(episode.seen[-1].observation.info.get("success", reward > 0))
    return replace(trajectory, reward=reward, success=success)


def _largest_first(change: Change) -> tuple[float, int]:
    return -change.size, change.episode


def _of_groups(numbers: Sequence[int], groups: int) -> str:
    some = ", ".join(map(str, numbers[:_LARGEST]))
    more = ", …" if len(numbers) > _LARGEST else ""
    return f"{len(numbers)} of {groups}" + (f": {some}{more}" if numbers else "")
