"""The evaluations of a run: when they are due, and whether rollout waits for them."""

import asyncio
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Protocol, Self

from flash.errors import RolloutStall
from flash.evaluation.background import BackgroundEvaluation
from flash.evaluation.config import EvalConfig
from flash.evaluation.play import EvaluationHub, heldout_tasks, play
from flash.evaluation.result import Evaluation
from flash.rollout.crew import Crew
from flash.rollout.episode import AgentFactories
from flash.rollout.loop import RolloutLoop
from flash.rollout.observer import Observer
from flash.stop import unless


class LendingHub(EvaluationHub, Protocol):
    """What evaluations need of the InferenceHub: to play on it, or on workers of their own."""

    def lend(self, workers: int) -> AbstractAsyncContextManager[EvaluationHub]: ...


class Evaluations:
    """Plays held-out tasks with rollout paused, or beside it on lent workers (`eval.mode`).

    Leaving the block ends the one that runs beside rollout; none has an effect on what is trained.

    Args:
        rollouts: what is paused.
        task_sets: the names of those whose held-out tasks are played.
        every, last: one is due each `every` steps (0: at no step), and after the last.
        observer: is told of each.
        stop: when it is set, what is played is given up.
        crew: makes who plays with rollout paused, in the place of agents of that kind.
        apart: that crew plays beside rollout, whose workers it has nothing of.
    """

    def __init__(
        self,
        settings: EvalConfig,
        rollouts: RolloutLoop,
        *,
        hub: LendingHub,
        agent: AgentFactories,
        task_sets: Iterable[str] = ("",),
        every: int,
        last: int,
        observer: Observer,
        stop: asyncio.Event,
        crew: Callable[[], Crew] | None = None,
        apart: bool = False,
    ) -> None:
        self._crew = crew
        self._apart = apart
        self._settings = settings
        self._rollouts = rollouts
        self._hub = hub
        self._agent = agent
        self._every = every
        self._last = last
        self._tasks = heldout_tasks(settings, task_sets)
        self._observer = observer
        self._stop = stop
        self._background = BackgroundEvaluation(observer.evaluated)
        self._players: Crew | None = None  # of the one that is played

    @property
    def waits_for(self) -> str:
        """What must come before the one that is played can go on, if that may take its time."""
        return "" if self._players is None else self._players.waits_for

    async def __aenter__(self) -> Self:
        await self._background.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._background.__aexit__(*exc_info)

    async def now(self) -> bool:
        """Evaluates the present policy with rollout paused. Whether that came to its end."""
        with self._rollouts.paused():
            crew = None if self._crew is None else self._crew()
            evaluation = await unless(self._stop, self._play(self._hub, crew))
        if evaluation is not None:
            self._observer.evaluated(evaluation)
        return evaluation is not None

    def due_after(self, step: int) -> bool:
        return step == self._last or (self._every > 0 and step % self._every == 0)

    async def after(self, step: int) -> None:
        """Evaluates the policy that this step has made, if that is due."""
        if self.due_after(step):
            if step < self._last and self._apart:
                self._background.begin(step, self._play_apart)
            elif step < self._last and self._settings.mode == "beside":
                self._background.begin(step, self._play_on_lent_workers)
            else:
                await self.now()
        if step == self._last - 1:  # the last step's line has an evaluation of its own
            await self.finish()

    async def finish(self) -> None:
        """Waits for the one that runs beside rollout, or gives it up if the run is to stop."""
        await unless(self._stop, self._background.finish())
        if self._stop.is_set():
            self._background.cancel()

    async def _play_on_lent_workers(self) -> Evaluation:
        """All of it is of one version: lent workers keep the weights that they have."""
        async with self._hub.lend(self._settings.workers) as share:
            return replace(await self._play(share), paused=False)

    async def _play_apart(self) -> Evaluation:
        """By who does nothing else, and keeps the weights that it has."""
        assert self._crew is not None
        return replace(await self._play(self._hub, self._crew()), paused=False)

    async def _play(self, hub: EvaluationHub, crew: Crew | None = None) -> Evaluation:
        settings = self._rollouts.settings
        self._players = crew
        try:
            return await play(
                hub,
                self._agent,
                self._tasks,
                concurrency=self._rollouts.capacity,
                max_attempts=settings.max_attempts,
                stall_timeout_s=settings.stall_timeout_s,
                crew=crew,
            )
        except RolloutStall as stall:
            self._observer.stalled(str(stall))
            raise
        finally:
            self._players = None
