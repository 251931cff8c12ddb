"""A limit of the memory of all processes and files of a sandbox: the kernel's control groups, of
version 1 or 2, where this process may make some."""

import asyncio
import contextlib
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

import psutil

logger = logging.getLogger(__name__)

_ROOT = Path("/sys/fs/cgroup")
_NAME = "flash-sandbox"
_WAITS_S = (0.01, 0.05, 0.25, 1.0, 5.0)
_numbers = itertools.count()


class _Files(NamedTuple):
    """The names that a version has."""

    limit: str
    with_swap: str
    events: str  # which tells how many processes were killed


_V1 = _Files("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control")
_V2 = _Files("memory.max", "memory.swap.max", "memory.events")


class MemoryGroup:
    """A control group of its own; what joins it stays in it, with all that it starts."""

    def __init__(self, folder: Path, files: _Files, limit_bytes: int) -> None:
        self._folder = folder
        self._files = files
        folder.mkdir()
        try:
            (folder / files.limit).write_text(str(limit_bytes))
            with contextlib.suppress(FileNotFoundError):  # a kernel that does not count it
                swap = limit_bytes if files is _V1 else 0
                (folder / files.with_swap).write_text(str(swap))
        except BaseException:
            folder.rmdir()
            raise

    @classmethod
    def make(cls, limit_bytes: int) -> Self | None:
        """None where this process may make none."""
        for parent, files in parents():
            _sweep(parent)
            name = f"{_NAME}-{os.getpid()}-{next(_numbers)}"
            with contextlib.suppress(OSError):
                return cls(parent / name, files, limit_bytes)
        return None

    @property
    def members(self) -> Path:
        """A process that writes 0 here joins it."""
        return self._folder / "cgroup.procs"

    @property
    def kills(self) -> int:
        """How many of its processes were killed for want of memory."""
        lines = (self._folder / self._files.events).read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])

    async def remove(self) -> None:
        """When all in it has been killed, which may take the kernel a moment."""
        for wait_s in _WAITS_S:
            try:
                self._folder.rmdir()
                return
            except OSError as error:
                why = error
                await asyncio.sleep(wait_s)
        logger.warning("a control group of a sandbox can't be removed: %s", why)


def parents(
    root: Path = _ROOT, own: Path = Path("/proc/self/cgroup")
) -> Iterator[tuple[Path, _Files]]:
    """Where a group with a limit can be made: below our own group, or beside it.

    A group of version 2 with processes in it has none below it, but for the root.
    """
    for line in own.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield root / "memory" / path.lstrip("/"), _V1
        elif number == "0":
            group = root / path.lstrip("/")
            for folder in (group, group.parent):
                with contextlib.suppress(OSError):
                    handed_down = (folder / "cgroup.subtree_control").read_text().split()
                    if "memory" in handed_down and os.access(folder / "cgroup.procs", os.W_OK):
                        yield folder, _V2


def _sweep(parent: Path) -> None:
    """Removes the groups that processes left which were killed."""
    for folder in parent.glob(f"{_NAME}-*"):
        if not psutil.pid_exists(int(folder.name.split("-")[2])):
            with contextlib.suppress(OSError):
                folder.rmdir()
