"""All the parts of a training run, started and put together."""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from flash.checkpoints import (
    Checkpoint,
    Checkpoints,
    Rescue,
    checkpoint_to_go_on_from,
    whole_versions,
)
from flash.config import Config
from flash.errors import TrainerFailure
from flash.evaluation.evaluations import Evaluations
from flash.explorer.hub import FleetHub
from flash.hub.hub import InferenceHub
from flash.log.keeping import first_needed
from flash.log.log import Log
from flash.log.past import Past
from flash.log.run_log import RunLog
from flash.parts.expert import expert_of
from flash.parts.model import self_test_text
from flash.parts.players import open_players
from flash.parts.roles import Earlier
from flash.parts.workers import probe_of
from flash.rollout.adaptive import AdaptiveAlpha
from flash.rollout.expert import ShuffledExpert
from flash.rollout.filters import find_filter
from flash.rollout.loop import RolloutLoop
from flash.rollout.observer import Observer, Observers
from flash.rollout.tasks import TaskSet
from flash.system.machine import gpus
from flash.telemetry.folder import RunFolder
from flash.telemetry.live import View
from flash.telemetry.progress import Progress
from flash.telemetry.redone import RedoneSteps
from flash.telemetry.status import StatusFile
from flash.telemetry.transcripts import Transcripts
from flash.trainer.advantages import make_advantages
from flash.trainer.config import TrainerConfig
from flash.trainer.lasting import LastingTrainer
from flash.trainer.ranks import RankStarter
from flash.trainer.trainer import Trainer
from flash.types import Batch

# Tokens that the self-test samples, where there is room.
_AFTER_TEXT, _LEAST_AFTER_TEXT = 96, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What a run consists of. `observers` are told of each event that is not the rollout loop's."""

    config: Config
    has_begun: bool  # its first policy was evaluated
    began_at: int  # the version that this start goes on from
    ended_there: int  # starts before, in a row, whose batch of that version never came to its step
    checkpoints: Checkpoints
    adaptive_alpha: AdaptiveAlpha
    trainer: LastingTrainer
    hub: InferenceHub | FleetHub
    earlier: Earlier
    rollouts: RolloutLoop
    evaluations: Evaluations
    progress: Progress
    observers: Observers

    def publishes_after(self, step: int) -> bool:
        """What is evaluated is published before."""
        every = self.config.publish_every
        return step % every == 0 or self.evaluations.due_after(step)

    async def publish(self) -> None:
        """The present weights, to workers; to those of an earlier policy if it is due."""
        weights = await self.trainer.export_weights()
        await self.rollouts.publish(weights)
        await self.earlier.publish(weights)

    async def step(self, batch: Batch) -> dict[str, float]:
        """Trains a batch, or the last part of one."""
        with self._told_of_failures(batch.version):
            return await self.trainer.step(batch)

    async def add(self, part: Batch) -> None:
        """Computes the gradient of a part that is not the last."""
        with self._told_of_failures(part.version):
            await self.trainer.add(part)

    @contextlib.contextmanager
    def _told_of_failures(self, version: int) -> Iterator[None]:
        """What the trainer raises over that batch tells if a resume alone will not help."""
        try:
            yield
        except (TrainerFailure, ValueError) as failure:
            if version == self.began_at and self.ended_there:
                failure.add_note(
                    f"the batch of version {version} is where {self.ended_there + 1} starts in a "
                    f"row have ended, this one included, and --resume trains it again: change what "
                    f"it fails for, as trainer.tokens_per_micro_batch where memory is short, or "
                    f"trainer.objective; or start anew under another name, with --model of what "
                    f"flash export makes of a checkpoint"
                )
            raise

    async def save_after(self, step: int) -> None:
        """Begins the checkpoint of that step, if one is due."""
        every = self.config.checkpoint.every
        if every > 0 and step % every == 0:
            await self.checkpoints.begin(self.trainer, spare=False)
        elif self.checkpoints.spare_is_due():
            await self.checkpoints.begin(self.trainer, spare=True)

    async def self_test(self) -> None:
        """PublishFailure if workers and trainer differ on a text longer than any window."""
        longest = min(self.config.agent.max_sequence_tokens, self.config.engine.cache_tokens)
        text = self_test_text(self.trainer.model, at_most=max(1, longest - _LEAST_AFTER_TEXT))
        probe = replace(probe_of(self.config), prompts=[text], tokens=_AFTER_TEXT).fitting(longest)
        await self.hub.probe(await self.trainer.export_weights(), probe)

    async def save(self) -> None:
        """A whole checkpoint of the present version, if there is none yet and any step in it."""
        await self.checkpoints.save(self.trainer, spare=False)


@contextlib.asynccontextmanager
async def open_training(
    config: Config,
    model: str,
    folder: RunFolder,
    view: View,
    stop: asyncio.Event,
    starter: RankStarter | None,
) -> AsyncIterator[Training]:
    """The run of a configuration, from `model` or from where it was left off; ended with the block.

    Episodes are under way as soon as there are workers, and the trainer loads meanwhile; of a run
    that goes on, as soon as the trainer is where it was.
    """
    adaptive = _adaptive_alpha(config)
    expert = await asyncio.to_thread(expert_of, config, model)
    async with RunLog(folder.path, config.log) as run_log:
        past = await run_log.take_over(
            checkpoint=folder.version if folder.resumes else None, config=folder.config
        )
        redone = RedoneSteps(past.steps, exact=config.trainer.dtype != "bfloat16" and not gpus())
        for until, settings in past.with_other_settings:
            past = await _redo_as_logged(
                config, model, folder, run_log, past, until, settings, redone, starter, view.say
            )
        if past.alpha is not None:
            adaptive.restore(past.alpha)
        if folder.resumes:
            folder.go_on(past)
            view.say(past.describe())

        def needed_from() -> int:
            return first_needed(whole_versions(folder.path), reach=math.ceil(config.alpha))

        async with (
            run_log.writing(past, alpha=adaptive.state, needed_from=needed_from) as log,
            _open(
                config,
                model,
                folder,
                view,
                stop,
                run_log,
                past,
                log,
                adaptive,
                redone,
                expert,
                starter,
            ) as run,
        ):
            yield run


@contextlib.asynccontextmanager
async def _open(
    config: Config,
    model: str,
    folder: RunFolder,
    view: View,
    stop: asyncio.Event,
    run_log: RunLog,
    past: Past,
    log: Log,
    adaptive: AdaptiveAlpha,
    redone: RedoneSteps,
    expert: ShuffledExpert | None,
    starter: RankStarter | None,
) -> AsyncIterator[Training]:
    observers = Observers([log, folder, redone])
    checkpoints = Checkpoints(
        folder.path,
        newest=folder.checkpoint,
        every_s=60 * config.checkpoint.minutes,
        observer=observers,
    )
    trainer = _trainer(
        config, config.trainer, model, folder, run_log, past, redone, starter, view.say
    )
    engine = config.engine
    given = bool(engine.urls) or engine.colocated or config.trainer.lora.publish == "adapters"
    async with (
        trainer.starting(),
        checkpoints.writing(),
        Rescue(checkpoints, trainer) as rescue,
        open_players(
            config,
            model=trainer.model,
            # The run's own workers start with the first model; others are given what is now.
            version=past.version if given else 0,
            weights=trainer.first_weights,
            folder=folder.path,
            say=view.say,
            due=past.restored.cut_off,
            start=past.start,
            known=past.known_of,
            after_commit=log.after_commit,
            is_over=lambda: trainer.version >= config.steps,
            trainer=trainer.state,
            make_room=partial(trainer.make_room, engine.gpu_memory) if engine.colocated else None,
        ) as players,
    ):
        if engine.colocated:
            assert isinstance(players.hub, InferenceHub)  # no explorer comes
            trainer.take_turns(players.hub.asleep)
        decode = players.tokenizer.decode
        per_step, steps = config.transcripts, config.steps
        observers.add(Transcripts(folder.transcript, decode=decode, per_step=per_step, steps=steps))
        if players.hub.version < past.version:
            await trainer.ready()
            weights = await trainer.export_weights()
            await players.hub.publish(weights)
            await players.earlier.publish(weights)
        rollouts = RolloutLoop(
            players.hub,
            crew=players.crew,
            task_sets=_task_sets(config, past),
            batch_size=config.batch_size,
            alpha=config.alpha,
            settings=config.rollout,
            advantages=make_advantages(
                config.trainer.advantages, finished=not config.trainer.finishes_advantages
            ),
            last_version=config.steps,
            restored=past.restored,
            observers=[observers],
            log=log,
            expert=expert,
            trainer=trainer.state,
            caller_timeout_s=config.trainer.between_batches_s,
        )
        rollouts.use_alpha(adaptive.alpha)
        log.fail_with(rollouts.fail)
        async with rollouts, players.gate():
            await trainer.ready()

            def waits_for() -> str:
                told = dict.fromkeys((rollouts.crew_waits_for, evaluations.waits_for))
                return "; ".join(filter(None, told))

            if told := redone.describe():
                view.say(told)
            progress = Progress(
                config, folder, view, hub=players.hub, rollouts=rollouts, hosts=players.hosts,
                log=log, observer=observers, waits_for=waits_for,
            )  # fmt: skip
            observers.add(progress)
            evaluations = Evaluations(
                config.eval,
                rollouts,
                hub=players.hub,
                agent=players.heldout,
                crew=players.examined,
                apart=config.explorers.evaluate,
                task_sets=config.sets,
                every=config.eval_every,
                last=config.steps,
                observer=observers,
                stop=stop,
            )
            rescue.watch(lambda: progress.steps_done)
            status = StatusFile(
                folder.path, hub=players.hub, rollouts=rollouts, trainer=trainer.state, log=log,
                fleet=players.fleet, step=lambda: trainer.version, steps=config.steps,
                waits_for=waits_for,
            )  # fmt: skip
            async with progress.ticking(), status.kept(), evaluations:
                yield Training(
                    config=config,
                    has_begun=past.has_begun,
                    began_at=past.version,
                    ended_there=past.ended_here,
                    checkpoints=checkpoints,
                    adaptive_alpha=adaptive,
                    trainer=trainer,
                    hub=players.hub,
                    earlier=players.earlier,
                    rollouts=rollouts,
                    evaluations=evaluations,
                    progress=progress,
                    observers=observers,
                )


def _task_sets(config: Config, past: Past) -> list[TaskSet]:
    """Those of the run, each from where it was left off."""
    return [
        TaskSet(
            name=name,
            tasks=past.tasks(config.seed, task_set=name),
            groups_per_batch=of_set.batch_size // of_set.group_size,
            group_size=of_set.group_size,
            filters=[find_filter(each) for each in of_set.rollout.filters],
        )
        for name, of_set in config.sets.items()
    ]


def _trainer(
    config: Config,
    settings: TrainerConfig,
    model: str,
    folder: RunFolder,
    run_log: RunLog,
    past: Past,
    redone: RedoneSteps,
    starter: RankStarter | None,
    say: Callable[[str], None],
) -> LastingTrainer:
    """It begins where the run stood, by the log's batches since the checkpoint."""

    def newest() -> Path | None:
        found = checkpoint_to_go_on_from(folder.path)
        return found.path if found else None

    trainer = Trainer(
        model=model,
        config=settings,
        run_dir=folder.path,
        seed=config.seed,
        resume_from=folder.checkpoint.path if folder.checkpoint else None,
        starter=starter,
        longest=config.agent.max_sequence_tokens,
        say=say,
    )
    return LastingTrainer(
        trainer,
        log=run_log,
        newest=newest,
        max_restarts=settings.max_restarts,
        version=past.version,
        redone=redone.redone,
    )


async def _redo_as_logged(
    config: Config,
    model: str,
    folder: RunFolder,
    run_log: RunLog,
    past: Past,
    until: int,
    settings: Mapping[str, Any],
    redone: RedoneSteps,
    starter: RankStarter | None,
    say: Callable[[str], None],
) -> Past:
    """Trains the batches before that version with the settings that they were trained with, and
    saves that: others hold from there on."""
    left = [version for version in past.redo if version >= until]
    done = replace(past, redo=[version for version in past.redo if version < until])
    logged = as_logged(settings, config.trainer)
    trainer = _trainer(config, logged, model, folder, run_log, done, redone, starter, say)
    checkpoints = Checkpoints(folder.path, newest=folder.checkpoint, every_s=0, observer=Observer())
    async with trainer:
        path = await checkpoints.save(trainer, spare=True)
    folder.checkpoint = Checkpoint(path, until)
    return replace(past, checkpoint=until, redo=left)


def as_logged(settings: Mapping[str, Any], now: TrainerConfig) -> TrainerConfig:
    """Settings that batches were trained with, on the ranks that there are now."""
    ranks = {name: getattr(now, name) for name in ("ranks", "shard_size", "sequence_ranks")}
    return TrainerConfig.model_validate({**settings, **ranks})


def _adaptive_alpha(config: Config) -> AdaptiveAlpha:
    """What decides α after each step; without thresholds it stays what is configured."""
    return AdaptiveAlpha(
        config.alpha,
        least=config.publish_every - 1,  # or the batches between two publishes had no room
        **config.rollout.adaptive_alpha.model_dump(),
    )
