"""All the parts of a training run, started and put together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from flash.config import Config
from flash.evaluation.evaluations import Evaluations
from flash.hub.hub import InferenceHub
from flash.parts.open import open_parts
from flash.rollout.adaptive import AdaptiveAlpha
from flash.rollout.loop import RolloutLoop
from flash.rollout.observer import Observers
from flash.rollout.tasks import Tasks
from flash.telemetry.folder import RunFolder
from flash.telemetry.live import View
from flash.telemetry.progress import Progress
from flash.trainer.advantages import make_advantages
from flash.trainer.checkpoint import checkpoint_version
from flash.trainer.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a run consists of. `observers` are told of each event that is not the rollout loop's."""

    config: Config
    folder: RunFolder
    tasks: Tasks
    adaptive_alpha: AdaptiveAlpha
    trainer: Trainer
    hub: InferenceHub
    rollouts: RolloutLoop
    evaluations: Evaluations
    progress: Progress
    observers: Observers

    def publishes_after(self, step: int) -> bool:
        """What is evaluated is published before."""
        every = self.config.publish_every
        return step % every == 0 or self.evaluations.due_after(step)

    def saves_after(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return every > 0 and step % every == 0

    async def save(self) -> None:
        """A checkpoint of the present version, unless there is one."""
        checkpoint = self.folder.checkpoint(self.trainer.version)
        if checkpoint.exists():
            return
        unfinished = self.rollouts.unfinished_tasks()
        await self.trainer.save_checkpoint(checkpoint)
        self.tasks.save(checkpoint, unfinished)
        self.adaptive_alpha.save(checkpoint)
        self.observers.saved(checkpoint)


@contextlib.asynccontextmanager
async def open_training(
    config: Config, model: str, folder: RunFolder, view: View, stop: asyncio.Event
) -> AsyncIterator[Training]:
    """The run of a configuration, from `model` or from where it was left off; ended with the block.

    Episodes are under way as soon as there are workers, and the trainer loads meanwhile.
    """
    tasks, adaptive = Tasks(config.seed), _adaptive_alpha(config)
    if folder.resume_from is not None:
        tasks.restore(folder.resume_from)
        adaptive.restore(folder.resume_from)
        folder.forget_after(checkpoint_version(folder.resume_from))
    observers = Observers([folder])
    async with (
        Trainer(
            model=model,
            config=config.trainer,
            run_dir=folder.path,
            seed=config.seed,
            resume_from=folder.resume_from,
        ).starting() as trainer,
        open_parts(
            config,
            model=trainer.model,
            version=trainer.version,
            weights=trainer.first_weights,
            log_dir=folder.logs,
            say=view.say,
            door_file=folder.logs / "door.json",
        ) as parts,
        parts.agents() as agents,
        parts.agents(heldout=True) as heldout_agents,
    ):
        rollouts = RolloutLoop(
            parts.hub,
            agent=agents.make,
            tasks=tasks,
            batch_size=config.batch_size,
            group_size=config.group_size,
            alpha=config.alpha,
            settings=config.rollout,
            advantages=make_advantages(
                config.trainer.advantages, finished=not config.trainer.finishes_advantages
            ),
            last_version=config.steps,
            observers=[observers],
            trainer=trainer.state,
            caller_timeout_s=config.trainer.between_batches_s,
        )
        rollouts.use_alpha(adaptive.alpha)
        async with rollouts:
            await trainer.ready()
            progress = Progress(
                config, folder, view, hub=parts.hub, rollouts=rollouts, hosts=agents.hosts
            )
            observers.add(progress)
            evaluations = Evaluations(
                config.eval,
                rollouts,
                hub=parts.hub,
                agent=heldout_agents.make,
                every=config.eval_every,
                last=config.steps,
                observer=observers,
                stop=stop,
            )
            async with progress.ticking(), evaluations:
                yield Training(
                    config=config,
                    folder=folder,
                    tasks=tasks,
                    adaptive_alpha=adaptive,
                    trainer=trainer,
                    hub=parts.hub,
                    rollouts=rollouts,
                    evaluations=evaluations,
                    progress=progress,
                    observers=observers,
                )


def _adaptive_alpha(config: Config) -> AdaptiveAlpha:
    """What decides α after each step; without thresholds it stays what is configured."""
    return AdaptiveAlpha(
        config.alpha,
        least=config.publish_every - 1,  # or the batches between two publishes had no room
        **config.rollout.adaptive_alpha.model_dump(),
    )
