"""One whole run, top to bottom.

       tasks ─► RolloutLoop ─► batch ─► Trainer ─► weights ─► RolloutLoop.publish ─► workers
                    ▲  agents ⇄ environments                        │
                    └──────────── InferenceHub ◄────────────────────┘

Rollout goes on by itself, in agents' coroutines and workers' processes; the loop below only takes
batches, trains on them and publishes. With α=0 nothing is admitted between batch and publish, so
the same lines are synchronous training.
"""

import asyncio
import functools
import logging
import os
import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from flash import parts
from flash.config import Config
from flash.errors import RolloutStall, first_error
from flash.evaluation.background import Beside
from flash.rollout import filters
from flash.rollout.adaptive import AdaptiveAlpha
from flash.rollout.episode import AgentFactory
from flash.rollout.loop import RolloutLoop
from flash.rollout.stall.blocked import watched_event_loop
from flash.telemetry.folder import RunFolder
from flash.telemetry.live import open_view
from flash.telemetry.progress import Progress
from flash.trainer.advantages import make_advantages
from flash.trainer.checkpoint import checkpoint_version
from flash.trainer.trainer import Trainer
from flash.types import Batch

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


async def train(config: Config, *, stop: asyncio.Event) -> dict[str, Any] | None:
    """Trains until `config.steps` or until `stop` is set, then saves; returns the summary.

    None if it was stopped before its first step began: there is nothing to go on with.
    Raises ValueError for what the user got wrong, FlashError with the cause if the run can't go
    on. What was measured until then is in the run's folder.
    """
    with (
        RunFolder(config) as folder,
        watched_event_loop(config.rollout.stall_timeout_s, _end_of(folder)),
        open_view() as view,
    ):
        model = await _unless(stop, parts.prepared_model(config, view.progress))
        if model is None:
            return None
        tokenizer = parts.load_tokenizer(model)
        style = parts.make_style(config, tokenizer)
        tasks = parts.Tasks(config.seed)
        adaptive = parts.adaptive_alpha(config)
        if folder.resume_from is not None:
            tasks.restore(folder.resume_from)
            adaptive.restore(folder.resume_from)
            folder.forget_after(checkpoint_version(folder.resume_from))
        async with (
            Trainer(
                model=model,
                config=config.trainer,
                run_dir=folder.path,
                seed=config.seed,
                resume_from=folder.resume_from,
            ).starting() as trainer,  # side by side with the workers
            parts.open_hub(
                config,
                model=trainer.model,
                version=trainer.version,
                weights=trainer.first_weights,
                log_dir=folder.logs,
                say=view.say,
            ) as hub,
            parts.open_door(config, hub, tokenizer=tokenizer, log_dir=folder.logs) as door,
            parts.open_envs(config, folder.logs) as envs,
            parts.open_envs(config, folder.logs, heldout=True) as heldout_envs,
            parts.open_reward(config, hub, tokenizer=tokenizer, log_dir=folder.logs) as reward,
            RolloutLoop(
                hub,
                agent=parts.agent_factory(
                    config, envs=envs, style=style, door=door, log_dir=folder.logs, reward=reward
                ),
                tasks=tasks,
                batch_size=config.batch_size,
                group_size=config.group_size,
                alpha=config.alpha,
                alpha_in_force=adaptive.alpha,
                on_stale=config.rollout.on_stale,
                update_mode=config.engine.update_mode,
                advantages=make_advantages(config.trainer.advantages),
                schedule=config.rollout.schedule,
                replicate=config.rollout.replicate,
                redundant_groups=config.rollout.redundant_groups,
                redundant_episodes=config.rollout.redundant_episodes,
                filters=[filters.find(name) for name in config.rollout.filters],
                max_filtered=config.rollout.max_filtered,
                last_version=config.steps,
                max_attempts=config.rollout.max_attempts,
                max_regenerations=config.rollout.max_regenerations,
                stall_timeout_s=config.rollout.stall_timeout_s,
                # Each of the trainer's calls has a deadline, and there are two between batches.
                caller_timeout_s=config.trainer.start_timeout_s + 2 * config.trainer.step_timeout_s,
                on_stall=config.rollout.on_stall,
                trainer=trainer.state,
                on_report=folder.stall,
                on_episode=folder.episode,
            ) as rollouts,
        ):
            await trainer.ready()
            progress = Progress(config, folder, view, hub=hub, rollouts=rollouts, envs=envs)
            examinee = parts.agent_factory(
                config,
                envs=heldout_envs,
                style=style,
                door=door,
                log_dir=folder.logs,
                heldout=True,
                reward=reward,
            )
            exam = _Exam(config, rollouts, examinee, progress, stop)
            async with progress.ticking(), exam.beside:
                if trainer.version == 0:
                    await hub.probe(await trainer.export_weights())
                    if not await exam.alone():
                        return None
                while trainer.version < config.steps and not stop.is_set():
                    batch = await _next_batch(config, stop, rollouts, trainer, progress)
                    if batch is None:
                        break
                    progress.took(batch)
                    progress.trained(await trainer.step(batch))
                    step = trainer.version
                    evaluates = step == config.steps or _is_due(step, config.eval_every)
                    report = None
                    if evaluates or _is_due(step, config.publish_every):
                        report = await rollouts.publish(await trainer.export_weights())
                    progress.published(report)
                    rollouts.follow(adaptive.after_step(progress.metrics))
                    await exam.after(step, due=evaluates)
                    progress.step_done(step)
                    if _is_due(step, config.checkpoint.every):
                        await _save(folder, trainer, rollouts, tasks, adaptive)
                await exam.finish()
                if not folder.checkpoint(trainer.version).exists():
                    await _save(folder, trainer, rollouts, tasks, adaptive)
            return await progress.summarise(stopped=stop.is_set())


async def _next_batch(
    config: Config,
    stop: asyncio.Event,
    rollouts: RolloutLoop,
    trainer: Trainer,
    progress: Progress,
) -> Batch | None:
    """The batch; under `stream` its last part, once the trainer has the others. None if stopped."""
    if not config.stream:
        return await _unless(stop, rollouts.next_batch())
    while (part := await _unless(stop, rollouts.next_part())) is not None and not part.last:
        progress.took(part)
        await trainer.add(part)
        progress.trained({})
    return part


class _Exam:
    """The evaluations of a run: beside rollout if so configured, with it paused at the ends."""

    def __init__(
        self,
        config: Config,
        rollouts: RolloutLoop,
        agent: AgentFactory,
        progress: Progress,
        stop: asyncio.Event,
    ) -> None:
        self.beside = Beside(progress.evaluated_beside)
        self._config = config
        tasks = parts.heldout_tasks(config)
        self._play = functools.partial(rollouts.evaluate, tasks, agent=agent)
        self._play_beside = functools.partial(
            rollouts.evaluate_beside, tasks, agent=agent, workers=config.eval.workers
        )
        self._progress = progress
        self._stop = stop

    async def alone(self) -> bool:
        """Whether it came to its end: not if the run is to stop."""
        evaluation = await _unless(self._stop, self._play())
        if evaluation is not None:
            self._progress.evaluated(evaluation)
        return evaluation is not None

    async def after(self, step: int, *, due: bool) -> None:
        """Of the weights just published, if it is due."""
        if due and step < self._config.steps and self._config.eval.mode == "beside":
            self.beside.begin(step, self._play_beside)
        elif due:
            await self.alone()
        if step == self._config.steps - 1:  # the last line has an evaluation of its own
            await _unless(self._stop, self.beside.finish())

    async def finish(self) -> None:
        """Waits for the one that runs, or gives it up if the run is to stop."""
        await _unless(self._stop, self.beside.finish())
        self.beside.cancel()


def _end_of(folder: RunFolder) -> Callable[[str], None]:
    """Ends the run when its event loop is blocked, and nothing in it can."""

    def end(report: str) -> None:
        folder.stall(report)
        print(f"flash: {report}", file=sys.stderr, flush=True)
        os._exit(RolloutStall.exit_code)  # the children end with it

    return end


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


async def _save(
    folder: RunFolder,
    trainer: Trainer,
    rollouts: RolloutLoop,
    tasks: parts.Tasks,
    adaptive: AdaptiveAlpha,
) -> None:
    checkpoint = folder.checkpoint(trainer.version)
    unfinished = rollouts.unfinished_tasks()
    await trainer.save_checkpoint(checkpoint)
    tasks.save(checkpoint, unfinished)
    adaptive.save(checkpoint)
    logger.info("saved %s", checkpoint)


async def _unless(stop: asyncio.Event, awaitable: Awaitable[_T]) -> _T | None:
    """The awaitable's result; None, and the awaitable cancelled, if `stop` is set first."""
    with first_error():
        async with asyncio.TaskGroup() as tasks:
            wanted = tasks.create_task(_await(awaitable), name="until stopped")
            stopped = tasks.create_task(stop.wait(), name="stop")
            await asyncio.wait((wanted, stopped), return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if not wanted.done():
                wanted.cancel()
    return None if wanted.cancelled() else wanted.result()


async def _await(awaitable: Awaitable[_T]) -> _T:
    return await awaitable
