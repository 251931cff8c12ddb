"""Whether processes have ended, whoever's children they are."""

import os
import select
from collections.abc import Iterable

GRACE_S = 30


class Watch:
    """Processes that are expected to end, each known by its file descriptor.

    A process id says less: it lives on until a parent asks for the exit status, and whoever
    inherits an orphan may never ask.
    """

    def __init__(self, pids: Iterable[int]) -> None:
        self.descriptors = {os.pidfd_open(pid): pid for pid in pids}

    def __len__(self) -> int:
        return len(self.descriptors)

    def left(self, within_s: float = GRACE_S) -> list[int]:
        """Waits until all have ended; the process ids of those that had not by then."""
        left = []
        for descriptor, pid in self.descriptors.items():
            # It becomes readable when the process ends.
            if not select.select([descriptor], [], [], within_s)[0]:
                left.append(pid)
            os.close(descriptor)
        self.descriptors.clear()
        return left
