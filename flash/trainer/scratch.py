"""A folder in memory for what is published, which outlives no run, however that ends."""

import asyncio
import contextlib
import fcntl
import itertools
import os
import shutil
import tempfile
from pathlib import Path

_TMPFS = Path("/dev/shm")
_PREFIX = "flash-trainer-"
_UNLOCKED = "flash-new-"  # until it is locked
_EXPORTS_KEPT = 2  # the one that is published, and the one before, which a worker may be reading


class Scratch:
    """`path`, until `remove`; locked by this process as long as it lives.

    A folder that nobody locks was left by a controller that was killed, and holds as much memory
    as a model: the next one to be made removes it.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = parent or (_TMPFS if _TMPFS.is_dir() else Path(tempfile.gettempdir()))
        for left in parent.glob(f"{_PREFIX}*"):
            _remove_if_left(left)
        made = Path(tempfile.mkdtemp(prefix=_UNLOCKED, dir=parent))
        self._lock = os.open(made, os.O_RDONLY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = made.rename(parent / made.name.replace(_UNLOCKED, _PREFIX, 1))
        self._exports: list[Path] = []
        self._ids = itertools.count()

    def new_export(self, version: int) -> Path:
        """Where weights of that version can be written."""
        return self.path / f"version_{version}_{next(self._ids)}"

    @property
    def newest(self) -> Path | None:
        """The export that was kept last."""
        return self._exports[-1] if self._exports else None

    async def keep(self, export: Path) -> None:
        """It is whole, and stays until the one after next is."""
        self._exports.append(export)
        while len(self._exports) > _EXPORTS_KEPT:
            await asyncio.to_thread(shutil.rmtree, self._exports.pop(0))

    async def sweep(self) -> None:
        """Removes all but the exports that are kept: what ranks that died have left."""
        for left in set(self.path.iterdir()) - set(self._exports):
            if left.is_dir():
                await asyncio.to_thread(shutil.rmtree, left)
            else:
                left.unlink()

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def _remove_if_left(folder: Path) -> None:
    with contextlib.suppress(OSError):  # it is another user's, or in use, or gone
        lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)
