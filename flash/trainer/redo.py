"""Trains logged batches again, so that a trainer is where another one was.

In float32 on a CPU the weights are the same to the last bit, if these are the same: the settings,
how many threads a rank has (`trainer.threads`), the kind of CPU, torch and transformers. A step
depends on nothing else, as long as a loss of a user's own doesn't.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Protocol

from flash.types import Batch

Tell = Callable[[int, Mapping[str, float]], None]
"""Of a step that was trained again: its number, and what it came to."""


class BatchLog(Protocol):
    """What was handed to the trainer, kept where no trainer's death can reach it."""

    def batches(self, version: int) -> AsyncIterator[list[Batch]]:
        """The batches from that policy version on, in order, each as the parts that it came in.

        Of one that came whole there is one part; the last of a batch has `last`. Samples must be
        those that the trainer was given, in their order, with the same types and the same bits.
        """
        ...


class Redone(Protocol):
    """What it takes of a Trainer."""

    version: int

    async def add(self, part: Batch) -> None: ...

    async def step(self, batch: Batch) -> Mapping[str, float]: ...


def tell_nobody(step: int, metrics: Mapping[str, float]) -> None:
    """For those who need not know."""


async def redo(trainer: Redone, log: BatchLog, until: int, *, tell: Tell = tell_nobody) -> None:
    """Trains what the log has, from the trainer's version on, until its version is `until`.

    The ranks must have begun from a checkpoint of that version, or from the first model. Raises
    ValueError if the log lacks a batch or the trainer is beyond it, TrainerFailure as a step does.
    """
    if trainer.version == until:
        return
    if trainer.version < until:
        async for *parts, last in log.batches(trainer.version):
            if last.version != trainer.version or not last.last:
                break
            for part in parts:
                await trainer.add(part)
            metrics = await trainer.step(last)
            tell(trainer.version, metrics)
            if trainer.version == until:
                return
    raise ValueError(
        f"the log has no batch of policy version {trainer.version}, and all are needed to go on at "
        f"{until}: resume from a checkpoint after which it has every batch"
    )
