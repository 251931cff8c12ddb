"""Files that a crash leaves whole or as they were, and a lock that ends with its process."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = ".lock"


def write_whole(path: Path, content: bytes) -> None:
    """Puts a file in the place of what was there."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def sync(*paths: Path) -> None:
    """Waits until the disk has these files, or the names in these folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class HeldError(Exception):
    """Another process has the lock; `pid` is which, if that is known."""

    def __init__(self, pid: str) -> None:
        super().__init__(f"process {pid}")
        self.pid = pid


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Nobody else locks the folder meanwhile, nor after a crash any longer; HeldError."""
    with (folder / LOCK_FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise HeldError(file.read().strip() or "unknown") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
