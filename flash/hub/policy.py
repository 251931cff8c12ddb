"""What every worker should sample with, and how one worker is given it."""

import asyncio
from dataclasses import dataclass

from flash.hub.slot import Slot
from flash.types import UpdateMode, Weights


@dataclass(frozen=True, slots=True)
class Replaced:
    """How long a worker took to load weights, and to reset what ran there."""

    load_s: float
    reset_s: float


class Policy:
    """The present version and its weights.

    `weights` are None if the workers had those of `version` from their start. While a version is
    published they are its weights already, and `version` is the one before: whoever catches up
    then need not do so again.
    """

    def __init__(self, version: int, weights: Weights | None) -> None:
        self.version = version
        self.weights = weights
        self.published = {version}  # what an answer may be of

    def announce(self, weights: Weights) -> None:
        """From now on workers are given these."""
        self.published.add(weights.version)
        self.weights = weights

    async def replace_weights(self, slot: Slot, weights: Weights, mode: UpdateMode) -> Replaced:
        """Pauses a worker, with what `mode` does to its requests, and leaves it going."""
        clock = asyncio.get_running_loop().time
        await slot.worker.pause(mode)
        began = clock()
        await slot.worker.load_weights(weights)
        loaded = reset = clock()
        if mode != "keep_stale_kv":
            await slot.worker.recompute()
            reset = clock()
        await slot.worker.set_version(weights.version)
        slot.version = weights.version
        await slot.worker.resume()
        return Replaced(load_s=loaded - began, reset_s=reset - loaded)

    async def catch_up(self, slot: Slot) -> None:
        """Gives a worker the present weights and version, and leaves it going.

        A publish does not wait for this, and passes over workers that are excluded; so what is
        present may change meanwhile. The weights are not probed: `score` speaks for the trainer as
        it is now, which may be a step ahead of them.
        """
        while True:
            weights = self.weights
            if weights is not None:
                await self.replace_weights(slot, weights, "abort")
            else:
                await slot.worker.set_version(self.version)
                await slot.worker.resume()  # a run that was killed may have left it paused
            if weights is self.weights:
                return
