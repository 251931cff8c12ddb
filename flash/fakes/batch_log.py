"""A log of batches that lasts as long as the process."""

from collections.abc import AsyncIterator

from flash.rollout.observer import Observer
from flash.types import Batch


class FakeBatchLog(Observer):
    """Keeps every batch that is handed over, for tests of what trains them again."""

    def __init__(self) -> None:
        self.kept: list[list[Batch]] = [[]]

    def handed_over(self, batch: Batch) -> None:
        self.kept[-1].append(batch)
        if batch.last:
            self.kept.append([])

    async def batches(self, version: int) -> AsyncIterator[list[Batch]]:
        for parts in self.kept:
            if parts and parts[0].version >= version:
                yield parts
