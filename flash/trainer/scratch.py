"""A folder in memory for what is published, which outlives no run, however that ends."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

_TMPFS = Path("/dev/shm")
_PREFIX = "flash-trainer-"
_UNLOCKED = "flash-new-"  # until it is locked


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
