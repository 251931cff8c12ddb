"""Files that a crash leaves whole or as they were, and a lock that ends with its process."""

import contextlib
import errno
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
    """Another process has the lock; `pid` is which, empty if that is not known."""

    def __init__(self, pid: str) -> None:
        super().__init__(f"process {pid or 'unknown'}")
        self.pid = pid


class Held:
    """A folder that this process has locked; anybody may move or remove it all the same."""

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._folder = folder
        self._descriptor = descriptor  # as long as it is open, no other folder is taken for this

    def check_there(self) -> None:
        """FileNotFoundError if the folder is not at its place any more."""
        try:
            there = os.path.samestat(os.fstat(self._descriptor), self._folder.stat())
        except OSError:
            there = False
        if not there:
            why = "the folder was removed or moved; leave it in its place until its run has ended"
            raise FileNotFoundError(errno.ENOENT, why, str(self._folder))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Held]:
    """Nobody else locks the folder meanwhile, nor after a crash any longer; HeldError."""
    with contextlib.ExitStack() as opened:
        file = opened.enter_context((folder / LOCK_FILE).open("a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise HeldError(file.read().strip()) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        descriptor = os.open(folder, os.O_RDONLY)
        opened.callback(os.close, descriptor)
        yield Held(folder, descriptor)
        with contextlib.suppress(OSError):
            file.truncate(0)  # nobody is told of a process that has ended
