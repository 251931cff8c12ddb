"""The trainer's handle in the controller: starts the ranks, calls all of them at once."""

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from flash.errors import NodeLost, ProcessFailure, TrainerFailure, first_error
from flash.system.process import Process
from flash.trainer.advantage_settings import Gae
from flash.trainer.advantages import Floats
from flash.trainer.checkpoint import (
    ADAPTERS_FILE,
    CRITIC_FOLDER,
    MODEL_FOLDER,
    checkpoint_version,
)
from flash.trainer.config import TOKENS_OF_PASS, TrainerConfig
from flash.trainer.packing import (
    MiniBatchShare,
    denominator_of,
    divide,
    divide_expert,
    plan,
)
from flash.trainer.passes import Room, common_room
from flash.trainer.ranks import LocalRanks, RankStarter, end_ranks
from flash.trainer.scratch import Scratch
from flash.trainer.values import less_penalties, with_values
from flash.types import (
    Batch,
    ExpertShare,
    Sample,
    SampledSequence,
    Scores,
    TrainerState,
    Weights,
)

logger = logging.getLogger(__name__)

# In float32 it is 1e-12, in bfloat16 1e-3; logprobs without their temperature give 0.1 and more.
_MISMATCH_ALARM = 0.05
_CHOSEN = ("trainer/tokens_per_pass", "trainer/recomputes")
_DEATH_NOTICE_S = 1.0  # for a rank's death to be known, once another complains of it


class Trainer:
    """FSDP ranks in their own processes, used as one object.

    >>> async with Trainer(model="path", config=TrainerConfig(), run_dir=Path("runs/x")) as trainer:
    ...     metrics = await trainer.step(batch)
    ...     weights = await trainer.export_weights()

    Args:
        model: a directory or a hub name, for AutoModelForCausalLM.
        run_dir: where the ranks' logs go.
        resume_from: a checkpoint of `save_checkpoint`; its weights take the place of the model's,
            or with `config.lora` its adapters are added to them.
        starter: of its ranks; by default they are processes on this machine.
        longest: tokens that a sample may have, if that is known; more than a GPU has room for in a
            pass is refused.
        say: is told in a line what is chosen for passes on a GPU, and what takes long at first; by
            default the log is.

    `version` counts the batches trained into the weights; a batch is one version, however many
    optimizer steps (`mini_batches`) it takes, because α is measured in batches.
    To enter it raises ValueError for a model that can't be trained, or samples that don't fit.
    Any call raises TrainerFailure, with the rank's traceback or log, when a rank raises or dies;
    the other ranks are killed then.
    """

    def __init__(
        self,
        *,
        model: str | Path,
        config: TrainerConfig,
        run_dir: Path,
        seed: int = 0,
        resume_from: Path | None = None,
        starter: RankStarter | None = None,
        longest: int | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self._longest = longest
        self._say = say or logger.info
        self._chosen: dict[str, int] = {}  # of passes, on a GPU
        self._starter: RankStarter = starter or LocalRanks()
        # The policy may have gone on from there; the reference stays where it began.
        self._reference = config.kl.reference or str(model) if config.kl.coefficient else None
        self.model = str(model)
        self._run_dir = run_dir
        self._seed = seed
        self._doing, self._since = "", 0.0  # a call, or none, since when
        self._interrupted = False  # a step was given up: which weights there are is not known
        self._children: Sequence[Process] = []
        self._writing: Sequence[Process] = []  # those that began the newest checkpoint
        self._scratch: Scratch | None = None  # there while it runs
        self._parts = 0  # of the next batch, given to the ranks
        self._parts_tokens = 0
        self._denominator = 0.0
        self._go_on_from(resume_from)

    def _go_on_from(self, checkpoint: Path | None) -> None:
        """Ranks that start will have what is in it; ValueError if that is not all they need."""
        self.version = 0 if checkpoint is None else checkpoint_version(checkpoint)
        self._checkpoint = checkpoint
        if checkpoint is None:
            return
        adapted = self.config.lora.rank > 0
        if adapted != (checkpoint / MODEL_FOLDER / ADAPTERS_FILE).exists():
            has = "a whole model and no adapters" if adapted else "adapters and no whole model"
            raise ValueError(
                f"{checkpoint} has {has}, with trainer.lora.rank={self.config.lora.rank}: give "
                f"trainer.lora as it was when that was saved, or begin at the first model"
            )
        if self.config.has_critic and not (checkpoint / CRITIC_FOLDER).exists():
            raise ValueError(
                f"{checkpoint} has no critic ({CRITIC_FOLDER}/), which trainer.advantages=gae "
                f"needs: resume from a checkpoint of a run with gae, or start anew from what "
                f"flash export makes of it"
            )

    async def __aenter__(self) -> "Trainer":
        self._scratch = Scratch()
        try:
            while not await self._started():
                await end_ranks(self._children)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def _started(self) -> bool:
        """Whether its ranks have started; no, if one was lost with its node meanwhile."""
        try:
            await self._start_ranks()
            await self._check_longest()
        except TrainerFailure as failure:
            if not isinstance(failure.__cause__, NodeLost):
                raise
            logger.warning("%s: the ranks are started again", failure)
            return False
        return True

    async def _start_ranks(self) -> None:
        assert self._scratch is not None
        ranks = self.config.ranks
        self._now_doing("start")
        started = await self._starter.start(ranks, self._run_dir / "logs")
        self._children = started.ranks
        checkpoint = str(self._checkpoint) if self._checkpoint else None
        refusals = await self._call_each(
            "start",
            [
                (
                    self.model,
                    checkpoint,
                    self.config,
                    rank,
                    ranks,
                    started.meetings[rank],
                    self._seed,
                    self._reference,
                )
                for rank in range(ranks)
            ],
            timeout_s=self.config.start_timeout_s,
        )
        if refusals[0]:  # all ranks say the same of the same model
            raise ValueError(f"model={self.model!r}: {refusals[0]}")
        if self.config.compile:
            self._say("trainer: compiles layers in the first passes, for a minute or more")

    async def _check_longest(self) -> None:
        """ValueError if the longest sample would not fit a GPU that nobody else uses."""
        if self._longest is None:
            return
        rooms: list[Room | None] = await self._call_each("room", [(True,)] * self.config.ranks)
        if (room := common_room(rooms)) is not None:
            room.check(
                self._longest,
                recompute=self.config.gradient_checkpointing,
                sequence_ranks=self.config.sequence_ranks,
            )

    async def restart(self, checkpoint: Path | None) -> None:
        """Ends its ranks, dead or not, and starts others: from a checkpoint, or as at first.

        `version` is then the checkpoint's, or 0. Weights that were exported stay as long as they
        would have. Raises what entering it raises, and can be called again then.
        """
        assert self._scratch is not None, "the trainer is not entered"
        await end_ranks(self._children)
        self._children = []
        await self._scratch.sweep()
        await asyncio.to_thread(self._go_on_from, checkpoint)
        self._interrupted, self._parts = False, 0
        await self._start_ranks()

    async def __aexit__(self, *exc_info: object) -> None:
        await end_ranks(self._children)
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    @contextlib.asynccontextmanager
    async def starting(self) -> AsyncIterator["Trainer"]:
        """As `async with trainer`, but the body begins while the ranks load their model.

        `ready` waits for them; if they fail, the body is cancelled and TrainerFailure raised.
        """
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                self._starting = tasks.create_task(self.__aenter__(), name="start the trainer")
                try:
                    yield self
                finally:
                    self._starting.cancel()
                    await asyncio.wait((self._starting,))
                    await self.__aexit__()

    async def ready(self) -> None:
        """Waits until the ranks of `starting` have loaded their model."""
        await asyncio.shield(self._starting)

    async def first_weights(self) -> Weights:
        """Those that it begins with, as soon as `starting` has loaded them."""
        await self.ready()
        return await self.export_weights()

    async def step(self, batch: Batch) -> dict[str, float]:
        """Train one batch: the next version. Returns means over its trained tokens.

        What its `expert` wrote is imitated beside its samples. With the last part of a batch whose
        other parts were given to `add`: trains all of it.
        Raises ValueError for samples that can't be trained on, naming the episode.
        """
        started = asyncio.get_running_loop().time()
        imitated = _imitated(batch.expert)
        if self._parts:
            await self.add(replace(batch, expert=None))
            expert = self._expert(batch.expert, imitated, mini_batches=1)
            metrics, *_ = await self._call_each(
                "finish", [(self._denominator, of_expert) for (of_expert,) in expert]
            )
            trained, self._parts = self._parts_tokens, 0
        else:
            metrics, trained = await self._step(self._trainable(batch), batch.expert, imitated)
        if imitated:
            metrics["expert/tokens"] = _trained_tokens(imitated)
        self.version += 1
        if (mismatch := metrics.get("mismatch/kl_fresh", 0.0)) > _MISMATCH_ALARM:
            logger.warning(
                "engine and trainer disagree on tokens of the same weights by %.2g nats a token "
                "(mismatch/kl_fresh), which staleness can't explain: one has other weights, a low "
                "precision, or samples from a changed distribution (vLLM must run with "
                "--logprobs-mode processed_logprobs), or on keys and values of older weights "
                "(engine.update_mode=keep_stale_kv)",
                mismatch,
            )
        elapsed = asyncio.get_running_loop().time() - started
        return {
            **metrics,
            "tokens/trained": trained,
            **self._chosen,
            "time/train_s": elapsed,
        }

    async def add(self, part: Batch) -> None:
        """Compute the gradient of a part of the next batch; `step` with the last part trains it.

        The step is the one that the whole batch at once would make. ValueError as for `step`.
        """
        if self.config.mini_batches > 1 or self.config.advantages.needs_batch:
            raise ValueError(
                f"trainer.mini_batches={self.config.mini_batches} with trainer.advantages.name="
                f"{self.config.advantages.name}: a batch can come in parts only as one mini-batch "
                f"with advantages of single groups: give the whole batch to step"
            )
        if part.expert is not None:
            raise ValueError("an expert's share of a batch comes with its last part: give it there")
        samples = self._trainable(part)
        if not samples:
            return
        first = self._parts == 0
        if first:
            self._denominator, self._parts_tokens = 0.0, 0
        await self._size_passes()
        shares = divide(samples, self.config, part=True)
        await self._call_each("add", [(mini, self.version, first) for (mini,) in shares])
        self._parts += 1
        self._denominator += denominator_of(samples, self.config)
        self._parts_tokens += _trained_tokens(samples)

    def _trainable(self, batch: Batch) -> list[Sample]:
        """The batch's samples that have a token to train on."""
        if batch.version != self.version:
            raise ValueError(
                f"the batch is for policy version {batch.version}, the trainer is at "
                f"{self.version}: hand over a batch that was checked against the present version"
            )
        for sample in batch.samples:
            _check(sample)
        return [sample for sample in batch.samples if (sample.loss_mask[1:] > 0).any()]

    async def _step(
        self, samples: Sequence[Sample], expert: ExpertShare | None, imitated: Sequence[Sample]
    ) -> tuple[dict[str, float], int]:
        """The step of a batch that came whole, and how many of its own tokens it trained."""
        if not samples:
            raise ValueError(
                "no token to train on: the loss mask of every sample of the batch is 0 (the first "
                "token of a sample never counts, nor does what was sampled under a constraint, "
                "such as tool_choice or response_format: agent.ignore overlooks them)"
            )
        await self._size_passes()
        of_critic: dict[str, float] = {}
        if isinstance(self.config.advantages, Gae):
            samples, of_critic = await self._valued(samples, self.config.advantages)
        elif self.config.finishes_advantages:
            penalties = await self._of_samples("penalties", samples)
            samples = less_penalties(samples, penalties, self.config)
        shares = divide(samples, self.config)
        of_expert = self._expert(expert, imitated, mini_batches=len(shares[0]))
        metrics, *_ = await self._call_each(
            "step",
            [(own, self.version, of) for own, of in zip(shares, of_expert, strict=True)],
        )
        return {**metrics, **of_critic}, _trained_tokens(samples)

    def _expert(
        self, expert: ExpertShare | None, imitated: Sequence[Sample], *, mini_batches: int
    ) -> list[list[MiniBatchShare]]:
        """Each rank's share of what is imitated, for each optimizer step."""
        weight = 0.0 if expert is None else expert.weight
        return divide_expert(imitated, weight, self.config, mini_batches=mini_batches)

    async def _size_passes(self) -> None:
        """Before the first step, when all that shares a GPU with the ranks is there: how many
        tokens a pass has, and whether it recomputes, as far as the configuration leaves it open."""
        tokens, recompute = self.config.tokens_per_micro_batch, self.config.gradient_checkpointing
        if tokens is not None and recompute is not None:
            return
        rooms: list[Room | None] = await self._call_each("room", [()] * self.config.ranks)
        if (room := common_room(rooms)) is None:  # on a CPU
            chosen = tokens or TOKENS_OF_PASS, bool(recompute)
        else:
            longest = math.ceil((self._longest or 0) / self.config.sequence_ranks)
            chosen = room.choose(tokens, recompute, longest=longest)
            if chosen[1] and not recompute:
                await self._call_each("recompute", [()] * self.config.ranks)
            self._say(room.told(*chosen))
            self._chosen = dict(zip(_CHOSEN, map(int, chosen), strict=True))
        names = ("tokens_per_micro_batch", "gradient_checkpointing")
        self.config = self.config.model_copy(update=dict(zip(names, chosen, strict=True)))

    async def _valued(
        self, samples: Sequence[Sample], settings: Gae
    ) -> tuple[Sequence[Sample], dict[str, float]]:
        """The samples with advantages by the critic as it is before the step."""
        return with_values(samples, await self._of_samples("values", samples), settings)

    async def _of_samples(self, method: str, samples: Sequence[Sample]) -> list[Floats]:
        """What that method of the ranks finds of each sample's trained tokens."""
        (of_ranks,) = plan(
            [sample.num_tokens for sample in samples],
            mini_batches=1,
            ranks=self.config.ranks,
            sequence_ranks=self.config.sequence_ranks,
            tokens_per_micro_batch=self.config.tokens_of_pass,
        )
        answers = await self._call_each(
            method,
            [([[samples[i] for i in micro] for micro in micros],) for micros in of_ranks],
        )
        found = {
            index: of_sample
            for micros, answer in zip(of_ranks, answers, strict=True)
            for micro, of_micro in zip(micros, answer, strict=True)
            for index, of_sample in zip(micro, of_micro, strict=True)
        }
        return [found[i] for i in range(len(samples))]

    def state(self) -> TrainerState:
        """For the watchdog."""
        dead = ", ".join(child.name for child in self._children if not child.alive)
        return TrainerState(
            doing=self._doing,
            since=self._since,
            dead=dead and f"{dead} ended",
            waits_for=self._starter.waits_for,
        )

    async def score(self, sequences: Sequence[Sequence[int]]) -> Scores:
        """Of the present weights, in as few forward passes as hold all sequences."""
        scores: Scores = await self._call("score", [list(s) for s in sequences])
        return scores

    async def export_weights(self) -> Weights:
        """Weights of the present version, in memory where there is a tmpfs.

        They stay until the export after next; `score` answers for them until the next step.
        """
        assert self._scratch is not None, "the trainer is not entered"
        path, before = self._scratch.new_export(self.version), self._scratch.newest
        changed = await self._call("export", str(path), None if before is None else str(before))
        await self._scratch.keep(path)
        adapters = self.config.lora.publish == "adapters"
        return Weights(
            version=self.version, path=path, score=self.score, changed=changed, adapters=adapters
        )

    async def make_room(self, share: float) -> float:
        """Has every rank keep so little of its GPU that this share is free, if it can; the share
        that is. The next step or save takes it back."""
        free: list[float] = await self._call_each("make_room", [(share,)] * self.config.ranks)
        return min(free)

    async def share_weights(self) -> Path | None:
        """Has every rank keep the weights in memory for others on its device, until `unshare`; the
        folder that tells of them, or None if there is no memory for it."""
        assert self._scratch is not None, "the trainer is not entered"
        directory = self._scratch.new_export(self.version).with_suffix(".shared")
        directory.mkdir()
        shared = await self._call("share", str(directory))
        return directory if shared else None

    async def unshare(self) -> None:
        assert self._scratch is not None, "the trainer is not entered"
        await self._call("unshare")
        await self._scratch.sweep()

    @property
    def can_save(self) -> bool:
        """Whether its ranks live, and none was left in the middle of a step."""
        return not self._interrupted and all(child.alive for child in self._children)

    async def save_checkpoint(self, directory: Path) -> None:
        """All it takes to go on: weights, optimizer, version; whole when it returns.

        A trainer that goes on from it has the settings of its own configuration.
        """
        await self.begin_checkpoint(directory)
        await self._call("written")

    async def begin_checkpoint(self, directory: Path) -> None:
        """As `save_checkpoint`, of which it copies all and writes nothing: `written` waits for
        that, and steps may be made meanwhile."""
        directory.mkdir(parents=True, exist_ok=True)
        await self._call("begin_checkpoint", str(directory), self.version)
        self._writing = self._children

    async def written(self) -> None:
        """Waits until the checkpoint that was begun last is whole.

        TrainerFailure if it can't be, also if a rank dies over it; ranks that live are left alone.
        """
        timeout_s = self.config.step_timeout_s
        writing = self._writing
        calls = [rank.call("written", timeout_s=timeout_s) for rank in writing]
        answers = await asyncio.gather(*calls, return_exceptions=True)
        told = [(rank.alive, answer) for rank, answer in zip(writing, answers, strict=True)]
        # Those that live complain of the one that died, too.
        for _, answer in sorted(told, key=lambda each: each[0]):
            if isinstance(answer, TimeoutError):
                raise TrainerFailure(
                    f"it took longer than {timeout_s:g} s (trainer.step_timeout_s)"
                ) from answer
            if isinstance(answer, BaseException):
                raise TrainerFailure(str(answer)) from answer

    async def save_model(self, directory: Path) -> None:
        """The model alone, in Hugging Face format; with `config.lora` its adapters, in PEFT's."""
        directory.parent.mkdir(parents=True, exist_ok=True)
        await self._call("save_model", str(directory))

    async def _call(self, method: str, *args: Any) -> Any:
        """Calls every rank alike; rank 0's answer."""
        return (await self._call_each(method, [args] * self.config.ranks))[0]

    async def _call_each(
        self, method: str, args_of_ranks: Sequence[tuple[Any, ...]], timeout_s: float | None = None
    ) -> list[Any]:
        """Calls every rank with its arguments; all answers."""
        timeout_s = timeout_s or self.config.step_timeout_s
        self._now_doing(method)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(child.call(method, *args, timeout_s=timeout_s))
                    for child, args in zip(self._children, args_of_ranks, strict=True)
                ]
        except BaseExceptionGroup as errors:
            cause = await self._cause(errors.exceptions[0])
            for child in self._children:
                child.kill()
            if isinstance(cause, ProcessFailure):
                raise TrainerFailure(str(cause)) from cause
            if isinstance(cause, TimeoutError):
                raise TrainerFailure(
                    f"the trainer's {method} took longer than {timeout_s:g} s "
                    f"(trainer.step_timeout_s, trainer.start_timeout_s)"
                ) from cause
            raise
        except asyncio.CancelledError:
            self._interrupted |= method in ("step", "finish")
            raise
        finally:
            self._now_doing("")
        return [task.result() for task in tasks]

    def _now_doing(self, method: str) -> None:
        self._doing, self._since = method, asyncio.get_running_loop().time()

    async def _cause(self, first: BaseException) -> BaseException:
        """Why the ranks failed: the death of one, or else what the first raised.

        The others, in a collective with the dead one, may notice its death before we do.
        """
        if not isinstance(first, ProcessFailure):
            return first

        async def noticed(child: Process) -> None:
            raise await child.wait_dead()

        try:
            with first_error():
                async with asyncio.timeout(_DEATH_NOTICE_S), asyncio.TaskGroup() as group:
                    for child in self._children:
                        group.create_task(noticed(child))
        except ProcessFailure as death:
            return death
        except TimeoutError:
            pass
        return first


def _trained_tokens(samples: Sequence[Sample]) -> int:
    return int(sum((sample.loss_mask[1:] > 0).sum() for sample in samples))


def _imitated(expert: ExpertShare | None) -> list[Sample]:
    """What an expert wrote, as samples, without those that have no token to imitate."""
    if expert is None:
        return []
    if not 0 <= expert.weight < 1:
        raise ValueError(
            f"the expert's weight is {expert.weight:g}: it must be at least 0 and below 1"
        )
    samples = [
        Sample.supervised(sequence.token_ids, sequence.loss_mask, episode=number)
        for number, sequence in enumerate(expert.sequences)
    ]
    for sequence, sample in zip(expert.sequences, samples, strict=True):
        _check(sample, sequence.source or f"sequence {sample.episode} of the expert's")
    return [sample for sample in samples if (sample.loss_mask[1:] > 0).any()]


def _check(sample: Sample, source: str = "") -> None:
    name = source or f"episode {sample.episode}"
    values = {field.name: getattr(sample, field.name) for field in fields(SampledSequence)}
    lengths = {
        name: len(value)
        for name, value in values.items()
        if value is not None and not isinstance(value, str)
    }
    if set(lengths.values()) != {sample.num_tokens} or not sample.num_tokens:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(
            f"{name}: the arrays have the lengths {told}; they must be equal, and above 0"
        )
    if not np.isfinite(sample.logprobs).all() or not np.isfinite(sample.advantage).all():
        raise ValueError(f"{name}: a logprob or the advantage is not finite")
    if not np.isfinite([sample.reward, *sample.turn_rewards]).all():
        raise ValueError(f"{name}: a reward is not finite")
    if np.shape(sample.advantage) not in ((), sample.token_ids.shape):
        raise ValueError(
            f"{name}: the advantage has the shape {np.shape(sample.advantage)}; "
            f"it must be one number, or one for each of the {sample.num_tokens} tokens"
        )
    unfit = ~((sample.temperatures > 0) & (sample.temperatures < np.inf))
    if unfit.any():
        raise ValueError(
            f"{name}: sampled at temperature {sample.temperatures[unfit][0]:g}; "
            f"only what was sampled at a temperature above 0 has logprobs to train on"
        )
    if not np.isfinite(sample.loss_mask).all() or (sample.loss_mask < 0).any():
        raise ValueError(f"{name}: the loss mask must be finite and at least 0")
