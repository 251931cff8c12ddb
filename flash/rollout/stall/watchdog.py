"""The watchdog of a rollout loop: every wait has a deadline; past it, a report and a remedy.

    whose wait                          deadline
    a call for a batch, a publish       stall_timeout_s
    the caller, between two calls       caller_timeout_s; stall_timeout_s if the trainer is dead
    an evaluation                       its own

The caller's begins anew with each call that the trainer is at, because these have deadlines of
their own, and a trainer that starts anew makes many; while it waits for what may take its time, as
a node of a cluster, there is none. A wait for a batch has stalled where nothing
moved for so long, or where all that ended had grown stale; not while the crew waits for what may
take its time, as explorers to come. Remedies that bring no gain are not tried for ever.
"""

import asyncio
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from flash.errors import RolloutStall
from flash.rollout.config import OnStall
from flash.rollout.episode import Episode
from flash.rollout.stall.activity import Call
from flash.rollout.stall.diagnosis import (
    Cause,
    InspectedHub,
    InspectedLoop,
    find_cause,
    fruitless,
    write_report,
)
from flash.types import TrainerState

logger = logging.getLogger(__name__)

_REMEDIES = 3  # in a row, without a gain
PAUSE = "pause"  # a call with deadlines of its own


class RestartingHub(InspectedHub, Protocol):
    """What the watchdog does to the hub, beside looking at it."""

    def give_up(self, worker: str, why: str) -> None: ...


class WatchedLoop(InspectedLoop, Protocol):
    """What the watchdog does to the RolloutLoop, beside looking at it."""

    @property
    def hub(self) -> RestartingHub: ...

    @property
    def crew_waits_for(self) -> str: ...

    def replace(self, episode: Episode) -> None:
        """Cancel it, if it still counts, and start its task again."""

    def fail(self, error: RolloutStall) -> None:
        """Whoever waits for a batch gets this error."""


class Watchdog:
    """Lives as long as the loop that it watches.

    Args:
        on_stall: what to do about it: `replace` cancels the blocking episodes and starts their
            tasks again; `restart` starts the worker at fault anew, or else replaces; what neither
            can help, and `stop`, ends the run.
        trainer: asked what the trainer is at, if anybody knows.
        on_stalled: given each report.

    A run that ends does so with RolloutStall: out of the call that waits for a batch, or else
    in place of whatever the caller waits for.
    """

    def __init__(
        self,
        loop: WatchedLoop,
        *,
        stall_timeout_s: float,
        caller_timeout_s: float,
        on_stall: OnStall,
        trainer: Callable[[], TrainerState] | None,
        on_stalled: Callable[[str], None],
    ) -> None:
        self._loop = loop
        self._stall_timeout_s = stall_timeout_s
        self._caller_timeout_s = caller_timeout_s
        self._on_stall = on_stall
        self._trainer = trainer
        self._on_stalled = on_stalled
        self._acted_at = 0.0
        self._remedies = 0
        self._gained_at = 0.0

    async def __aenter__(self) -> "Watchdog":
        self._loop.activity.start()
        self._acted_at = _now()
        self._caller = asyncio.current_task()
        self._tasks = asyncio.TaskGroup()
        await self._tasks.__aenter__()
        self._task = self._tasks.create_task(self._watch(), name="watchdog")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._task.cancel()
        try:
            await self._tasks.__aexit__(kind, error, trace)
        except BaseExceptionGroup as errors:
            stalls = [one for one in errors.exceptions if one is not error]
            if stalls:
                raise stalls[0] from error

    async def _watch(self) -> None:
        while True:
            call, since, timeout_s = self._longest_wait()
            left_s = since + timeout_s - _now()
            if left_s > 0:
                # What comes due earlier began later, so it is not before the shorter deadline.
                await asyncio.sleep(min(left_s, self._stall_timeout_s))
                continue
            self._act_on_stall(call, since)

    def _longest_wait(self) -> tuple[Call | None, float, float]:
        """The wait that comes due first: its call, since when nothing moved in it, its deadline."""
        calls = [call for call in self._loop.activity.calls if call.name != PAUSE]
        if not self._loop.activity.calls:
            trainer = TrainerState() if self._trainer is None else self._trainer()
            if trainer.waits_for:
                return None, _now(), self._caller_timeout_s
            timeout_s = self._stall_timeout_s if trainer.dead else self._caller_timeout_s
            idle_since = self._loop.activity.idle_since
            return None, max(idle_since, self._acted_at, trainer.since), timeout_s
        waits = [(call, self._quiet_since(call)) for call in calls]
        call, since = min(waits, key=lambda wait: wait[1], default=(None, _now()))
        return call, since, self._stall_timeout_s

    def _quiet_since(self, call: Call) -> float:
        activity = self._loop.activity
        since = max(call.since, self._acted_at)
        if call.name == "publish":
            return since
        if self._loop.crew_waits_for:
            return _now()
        if fruitless(self._loop):
            return max(since, activity.gained_at)
        running = self._loop.under_way()
        return max(since, activity.moved_at, *(episode.stage_since for episode in running))

    def _act_on_stall(self, call: Call | None, since: float) -> None:
        """Says what is wrong, and does something about it."""
        trainer = self._trainer() if self._trainer is not None else None
        cause = find_cause(self._loop, call, trainer)
        remedy = self._remedy(cause)
        report = write_report(self._loop, cause, since=since, trainer=trainer, caller=self._caller)
        report += f"\non_stall={self._on_stall}: {remedy}"
        logger.error("%s", report)
        self._on_stalled(report)
        self._acted_at = _now()
        if remedy == "restart":
            self._loop.hub.give_up(cause.worker, cause.words)
        elif remedy == "replace":
            for episode in cause.episodes:
                self._loop.replace(episode)
        else:
            stall = RolloutStall(cause.name, report)
            self._loop.fail(stall)
            if call is None or call.name == "publish":
                raise stall

    def _remedy(self, cause: Cause) -> OnStall:
        gained_at = self._loop.activity.gained_at
        if gained_at != self._gained_at:
            self._gained_at, self._remedies = gained_at, 0
        self._remedies += 1
        if self._remedies > _REMEDIES or self._on_stall == "stop":
            return "stop"
        if self._on_stall == "restart" and cause.worker:
            return "restart"
        helps = any(episode.cancel_reason is None for episode in cause.episodes)
        return "replace" if helps else "stop"


def _now() -> float:
    return asyncio.get_running_loop().time()
