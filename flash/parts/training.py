"""All the parts of a training run, started and put together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from flash.checkpoints import Checkpoints, Cut, Rescue
from flash.config import Config
from flash.evaluation.evaluations import Evaluations
from flash.hub.hub import InferenceHub
from flash.hub.publisher import PROBE_TOKENS
from flash.parts.model import self_test_text
from flash.parts.open import open_parts
from flash.rollout.adaptive import AdaptiveAlpha
from flash.rollout.loop import RolloutLoop
from flash.rollout.observer import Observers
from flash.rollout.tasks import Tasks
from flash.telemetry.folder import RunFolder
from flash.telemetry.live import View
from flash.telemetry.progress import Progress
from flash.telemetry.transcripts import Transcripts
from flash.trainer.advantages import make_advantages
from flash.trainer.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a run consists of. `observers` are told of each event that is not the rollout loop's."""

    config: Config
    checkpoints: Checkpoints
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

    async def save_after(self, step: int) -> None:
        """The checkpoint of that step, if one is due."""
        every = self.config.checkpoint.every
        if every > 0 and step % every == 0:
            await self.save()
        elif self.checkpoints.spare_is_due():
            await self.save(spare=True)

    async def self_test(self) -> None:
        """PublishFailure if workers and trainer differ on a text longer than any window."""
        longest = min(self.config.agent.max_sequence_tokens, self.config.engine.cache_tokens)
        text = self_test_text(self.trainer.model, at_most=longest - PROBE_TOKENS)
        await self.hub.probe(await self.trainer.export_weights(), text)

    async def save(self, *, spare: bool = False) -> None:
        """A checkpoint of the present version, if there is none yet and any step in it."""
        await self.checkpoints.save(self.trainer, self.cut(), spare=spare)

    def cut(self) -> Cut:
        """Where it stands now, if the trainer is not in the middle of a step."""
        version = self.trainer.version
        unfinished = [task.seed for task in self.rollouts.unfinished_tasks(version)]
        return Cut(
            version=version,
            given=self.tasks.given,
            unfinished=unfinished + self.tasks.left,
            alpha=self.adaptive_alpha.state(),
        )


@contextlib.asynccontextmanager
async def open_training(
    config: Config, model: str, folder: RunFolder, view: View, stop: asyncio.Event
) -> AsyncIterator[Training]:
    """The run of a configuration, from `model` or from where it was left off; ended with the block.

    Episodes are under way as soon as there are workers, and the trainer loads meanwhile.
    """
    tasks, adaptive = Tasks(config.seed), _adaptive_alpha(config)
    first_ids = folder.next_ids()
    if (resumed := folder.resumed) is not None:
        tasks.go_on(given=resumed.cut.given, unfinished=resumed.cut.unfinished)
        adaptive.restore(resumed.cut.alpha)
        folder.forget_after(resumed.cut.version)
    observers = Observers([folder])
    checkpoints = Checkpoints(
        folder.path,
        resumed=resumed,
        every_s=60 * config.checkpoint.minutes,
        observer=observers,
    )
    async with (
        Trainer(
            model=model,
            config=config.trainer,
            run_dir=folder.path,
            seed=config.seed,
            resume_from=resumed.path if resumed else None,
        ).starting() as trainer,
        Rescue(checkpoints, trainer) as rescue,
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
        decode = parts.tokenizer.decode
        per_step, steps = config.transcripts, config.steps
        observers.add(Transcripts(folder.transcript, decode=decode, per_step=per_step, steps=steps))
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
            first_ids=first_ids,
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
            run = Training(
                config=config,
                checkpoints=checkpoints,
                tasks=tasks,
                adaptive_alpha=adaptive,
                trainer=trainer,
                hub=parts.hub,
                rollouts=rollouts,
                evaluations=evaluations,
                progress=progress,
                observers=observers,
            )
            with rescue.watching(run.cut):
                async with progress.ticking(), evaluations:
                    yield run


def _adaptive_alpha(config: Config) -> AdaptiveAlpha:
    """What decides α after each step; without thresholds it stays what is configured."""
    return AdaptiveAlpha(
        config.alpha,
        least=config.publish_every - 1,  # or the batches between two publishes had no room
        **config.rollout.adaptive_alpha.model_dump(),
    )
