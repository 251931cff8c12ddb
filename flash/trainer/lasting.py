"""A trainer whose ranks may die: others take their place, at the same weights.

    a rank dies, raises or hangs ─► all are killed ─► start from the newest checkpoint
                                                                   │
      the call is made again ◄── parts of the next batch ◄── redo from the log

Between a death and the next call nothing happens.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from flash.errors import TrainerFailure, in_a_line
from flash.trainer.checkpoint import checkpoint_version
from flash.trainer.redo import BatchLog, Tell, redo, tell_nobody
from flash.trainer.trainer import Trainer
from flash.types import Batch, Scores, TrainerState, Weights

logger = logging.getLogger(__name__)

T = TypeVar("T")


class LastingTrainer:
    """A Trainer, used as one; its calls raise TrainerFailure only when it is given up.

    >>> trainer = LastingTrainer(Trainer(…), log=log, newest=newest, max_restarts=3)
    >>> async with trainer.starting():
    ...     metrics = await trainer.step(batch)  # however many ranks die over it

    Args:
        trainer: not entered yet; it is entered and left with this one.
        log: has every batch before `step` or `add` is given it.
        newest: the run's newest whole checkpoint, None if there is none; called in a thread.
        max_restarts: so many in a row, without a step between them.
        version: where it shall stand when it has begun: the log is redone until there. By default
            the trainer's own.
        redone: is told of each step that is trained again.

    What its first start raises it raises at once. A ValueError, of a sample that can't be trained
    on, is nothing that other ranks would mend.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        log: BatchLog,
        newest: Callable[[], Path | None],
        max_restarts: int,
        version: int | None = None,
        redone: Tell = tell_nobody,
    ) -> None:
        self.version = trainer.version if version is None else version
        self.model = trainer.model
        self.restarts = 0
        self._trainer = trainer
        self._log = log
        self._newest = newest
        self._max_restarts = max_restarts
        self._redone = redone
        self._in_a_row = 0
        self._parts: list[Batch] = []  # of the next batch, so far
        self._failure: TrainerFailure | None = None  # of the ranks there are
        self._behind = self.version != trainer.version
        self._given_up: TrainerFailure | None = None
        self._exported: Weights | None = None
        self._one_at_a_time = asyncio.Lock()
        self._turn: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext
        self._has_made_room = False

    async def __aenter__(self) -> Self:
        await self._trainer.__aenter__()
        try:
            await self._call(_nothing)
        except BaseException:
            await self._trainer.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._trainer.__aexit__()

    @contextlib.asynccontextmanager
    async def starting(self) -> AsyncIterator[Self]:
        """As `async with trainer`, but the body begins while the ranks load their model."""
        async with self._trainer.starting():
            yield self

    async def ready(self) -> None:
        """Waits until the ranks of `starting` are where they shall begin."""
        await self._trainer.ready()
        await self._call(_nothing)

    async def first_weights(self) -> Weights:
        """Those that it begins with, as soon as `starting` has come to them."""
        await self.ready()
        return await self.export_weights()

    async def step(self, batch: Batch) -> dict[str, float]:
        """As `Trainer.step`, and how often ranks were started anew."""
        metrics = await self._call(lambda: self._trainer.step(batch), alone=True)
        self.version = self._trainer.version
        self._parts = []
        self._in_a_row = 0
        return {**metrics, "trainer/restarts": self.restarts}

    async def add(self, part: Batch) -> None:
        """As `Trainer.add`."""
        await self._call(lambda: self._trainer.add(part), alone=True)
        self._parts.append(part)

    async def export_weights(self) -> Weights:
        """As `Trainer.export_weights`, once for each version; the files stay whichever ranks die,
        until the export of the version after next."""
        if self._exported is None or self._exported.version != self.version:
            weights = await self._call(self._trainer.export_weights)
            self._exported = replace(
                weights,
                score=partial(self._score_at, self.version),
                share=partial(self._shared_at, self.version),
            )
        return self._exported

    async def _score_at(self, version: int, sequences: Sequence[Sequence[int]]) -> Scores | None:
        """As `score`; None if it has another version by now."""

        async def ask() -> Scores | None:
            if self._trainer.version != version:
                return None
            return await self._trainer.score(sequences)

        return await self._call(ask)

    @contextlib.asynccontextmanager
    async def _shared_at(self, version: int) -> AsyncIterator[Path | None]:
        """As `Weights.share`; None as well if it has another version by now."""

        async def share() -> Path | None:
            return await self._trainer.share_weights() if self._trainer.version == version else None

        directory = await self._call(share)
        yield directory
        if directory is not None:
            await self._call(self._trainer.unshare)

    async def score(self, sequences: Sequence[Sequence[int]]) -> Scores:
        """As `Trainer.score`."""
        return await self._call(lambda: self._trainer.score(sequences))

    async def save_checkpoint(self, directory: Path) -> None:
        """As `Trainer.save_checkpoint`."""
        await self._call(lambda: self._trainer.save_checkpoint(directory), alone=True)

    async def begin_checkpoint(self, directory: Path) -> None:
        """As `Trainer.begin_checkpoint`."""
        await self._call(lambda: self._trainer.begin_checkpoint(directory), alone=True)

    async def written(self) -> None:
        """As `Trainer.written`: what was begun is given up if a rank dies over it."""
        await self._trainer.written()

    def take_turns(self, turn: Callable[[], AbstractAsyncContextManager[None]]) -> None:
        """From now on its ranks share their GPUs, which they have to themselves in a `turn`.

        They take one to step, to save and to start anew, not to export or to score; what a
        checkpoint takes of a GPU is a copy.
        """
        self._turn = turn

    def turn(self) -> AbstractAsyncContextManager[None]:
        """The ranks have their GPUs to themselves in the block; it may be nested."""
        return self._turn()

    async def make_room(self, share: float) -> None:
        """Leaves that share of each GPU's memory to others, until the next turn.

        The optimizer's state moves to host memory if it must. Raises ValueError if even then there
        is less before anybody else has any.
        """
        free = await self._call(lambda: self._trainer.make_room(share))
        if free < share and not self._has_made_room:
            raise ValueError(
                f"engine.gpu_memory={share:g} with engine.colocated=true: the trainer's weights "
                f"leave {free:.2f} of a GPU's memory free: lower it, or take more trainer.ranks"
            )
        self._has_made_room = True

    @property
    def can_save(self) -> bool:
        """Whether its ranks live, at this version and not in the middle of a step."""
        return self._failure is None and not self._behind and self._trainer.can_save

    def state(self) -> TrainerState:
        """For the watchdog: dead is only what is given up."""
        state = self._trainer.state()
        if self._given_up is not None:
            return replace(state, dead=in_a_line(self._given_up))
        doing = state.doing
        if self._failure is not None or self._behind:
            doing = f"restart: {doing}" if doing else "restart"
        return replace(state, doing=doing, dead="")

    async def _call(self, call: Callable[[], Awaitable[T]], *, alone: bool = False) -> T:
        """Its result, from ranks that are started anew as often as they fail and may.

        `alone`: in a turn of their own, which they take to start anew in any case.
        """
        while self._given_up is None:
            mends = self._failure is not None or self._behind
            # Whoever ends a turn has room made, which is a call as well: no lock around it.
            turn = self._turn() if alone or mends else contextlib.nullcontext()
            async with turn, self._one_at_a_time:
                if self._given_up is not None:
                    break
                try:
                    await self._mend()
                    return await call()
                except TrainerFailure as failure:
                    self._count(failure)
        raise self._given_up

    def _count(self, failure: TrainerFailure) -> None:
        """The trainer is given up, or started anew before the next call."""
        self._failure = failure
        if self._given_up is None and self._in_a_row == self._max_restarts:
            self._given_up = failure
            if self._max_restarts:
                failure.add_note(
                    f"its ranks were started anew {self._max_restarts} times without a step "
                    f"(trainer.max_restarts)"
                )
        self._in_a_row += 1

    async def _mend(self) -> None:
        """Ranks that live, with the weights of this version and what there is of the next batch."""
        failure = self._failure
        try:
            if failure is not None:
                await self._restart(failure)
            if self._behind:
                await redo(self._trainer, self._log, self.version, tell=self._redone)
                for part in self._parts:
                    await self._trainer.add(part)
                self._behind = False
        except ValueError as error:
            if failure is None:
                raise
            self._given_up = TrainerFailure(f"{failure}\nThe trainer can't start anew: {error}")
            raise self._given_up from error

    async def _restart(self, failure: TrainerFailure) -> None:
        """Other ranks, as of the newest checkpoint."""
        checkpoint, version = await asyncio.to_thread(self._newest_version)
        self.restarts += 1
        self._behind = True
        logger.warning(
            "%s; restart %d of at most %d in a row (trainer.max_restarts), from %s, batches to "
            "train again: %d",
            in_a_line(failure), self._in_a_row, self._max_restarts, checkpoint or "the first model",
            self.version - version,
        )  # fmt: skip
        try:
            await self._trainer.restart(checkpoint)
        except OSError as error:  # this machine has no room for them
            raise TrainerFailure(f"the trainer's ranks can't be started: {error}") from error
        self._failure = None

    def _newest_version(self) -> tuple[Path | None, int]:
        checkpoint = self._newest()
        return checkpoint, 0 if checkpoint is None else checkpoint_version(checkpoint)


async def _nothing() -> None:
    pass
