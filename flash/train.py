"""One whole run, top to bottom.

       tasks ─► RolloutLoop ─► batch ─► Trainer ─► weights ─► RolloutLoop.publish ─► workers
                    ▲  agents ⇄ environments                        │
                    └──────────── InferenceHub ◄────────────────────┘

Rollout goes on by itself, in agents' coroutines and workers' processes; the loop below only takes
batches, trains on them and publishes. With α=0 nothing is admitted between batch and publish, so
the same lines are synchronous training.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flash.config import Config
from flash.errors import RolloutStall
from flash.parts.devices import check_devices
from flash.parts.model import prepared_model
from flash.parts.training import Training, open_training
from flash.rollout.stall.blocked import watched_event_loop
from flash.stop import given_up_by, unless
from flash.telemetry.folder import RunFolder
from flash.telemetry.live import open_view
from flash.trainer.ranks import RankStarter
from flash.types import Batch

logger = logging.getLogger(__name__)


async def train(
    config: Config,
    *,
    stop: asyncio.Event,
    opened: Callable[[Path], None] = lambda _: None,
    starter: RankStarter | None = None,
) -> dict[str, Any] | None:
    """Trains until `config.steps` or until `stop` is set, then saves; returns the summary.

    `opened` is told the run's folder once it is this run's. `starter`: of the trainer's ranks; by
    default they are processes on this machine.
    None if it was stopped before its first step began: there is nothing to go on with.
    Raises ValueError for what the user got wrong, FlashError with the cause if the run can't go
    on. What was measured until then is in the run's folder.
    """
    warn_of_idle_steps(config)
    with (
        RunFolder(config) as folder,
        watched_event_loop(config.rollout.stall_timeout_s, _end_of(folder)),
        open_view() as view,
    ):
        opened(folder.path)
        model = await unless(stop, prepared_model(config, view.progress))
        if model is None:
            return None
        nodes = 1 if starter is None else starter.nodes
        await check_devices(config, model, say=view.say, nodes=nodes)
        async with (
            given_up_by(stop) as opening,
            open_training(config, model, folder, view, stop, starter) as run,
        ):
            opening.is_over()
            trainer, rollouts, tell = run.trainer, run.rollouts, run.observers
            await run.self_test()
            if not run.has_begun and not await run.evaluations.now():
                return None
            while trainer.version < config.steps and not stop.is_set():
                batch = await _next_batch(run, stop)
                if batch is None:
                    break
                async with trainer.turn():
                    tell.trained(await run.step(batch))
                    step = trainer.version
                    if run.publishes_after(step):
                        await run.publish()
                rollouts.use_alpha(run.adaptive_alpha.after_step(run.progress.metrics))
                await run.evaluations.after(step)
                tell.step_done(step)
                await run.save_after(step)
            await run.evaluations.finish()
            await run.save()
            return await run.progress.summarise(stopped=stop.is_set())
        return None


def warn_of_idle_steps(config: Config) -> None:
    """One line in the log if the learning rate is 0 before the run has ended."""
    trainer = config.trainer
    if (last := trainer.last_update) is not None and last < config.steps * trainer.mini_batches:
        logger.warning(
            "trainer.decay_steps=%d with warmup_steps=%d: the learning rate is 0 after step %d of "
            "steps=%d, and nothing is learned from there on: raise decay_steps, or lower steps",
            trainer.decay_steps, trainer.warmup_steps, last // trainer.mini_batches, config.steps,
        )  # fmt: skip


async def _next_batch(run: Training, stop: asyncio.Event) -> Batch | None:
    """The batch; under `stream` its last part, once the trainer has the others. None if stopped."""
    if not run.config.stream:
        return await unless(stop, run.rollouts.next_batch())
    while (part := await unless(stop, run.rollouts.next_part())) is not None and not part.last:
        await run.add(part)
        run.observers.trained({})
    return part


def _end_of(folder: RunFolder) -> Callable[[str], None]:
    """Ends the run when its event loop is blocked, and nothing in it can."""

    def end(report: str) -> None:
        folder.stalled(report)
        print(f"flash: {report}", file=sys.stderr, flush=True)
        os._exit(RolloutStall.exit_code)  # the children end with it

    return end
