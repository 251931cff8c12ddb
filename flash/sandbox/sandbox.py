"""What a sandbox is: commands run in it, files go in and out, and nothing outlives it."""

import asyncio
import io
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Protocol, Self

from flash.errors import EnvFailure

WORK = "/work"
"""The folder of a sandbox's own that it may write to, empty at first; so are /tmp and /dev/shm."""


class SandboxUnavailable(ValueError):
    """This machine can't have such a sandbox; says what is missing, and the remedy."""


class FileFailure(EnvFailure):
    """A file of a sandbox can't be written or read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one sandbox.

    seconds: for one command, unless it is run with another number.
    memory_mb: of all its processes and files together, where control groups can be made; else of
        the address space of each process.
    processes: and threads, at once.
    disk_mb: of all files that it writes.
    output_bytes: of each stream of one command; what is more is thrown away.
    """

    seconds: float = 30.0
    memory_mb: int = 1024
    processes: int = 128
    disk_mb: int = 256
    output_bytes: int = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a command ended, with all that it had started.

    returncode: negative for a signal, as of `subprocess`; 127 if there is no such command or
        folder, which stderr tells; None if it did not end by itself.
    ended: memory: the limit was reached, and the kernel killed some of it; killed: by somebody
        outside.
    cut: whether more than the limit was written to stdout or stderr.
    """

    returncode: int | None
    stdout: bytes
    stderr: bytes
    ended: Literal["exited", "deadline", "memory", "killed"]
    cut: bool = False


class Started(Protocol):
    """A command that goes on beside others. Nobody reads what it writes but the caller."""

    stdin: asyncio.StreamWriter
    stdout: asyncio.StreamReader
    stderr: asyncio.StreamReader

    async def wait(self) -> int | None:
        """Its exit code, as in Outcome, once all of it has ended; None if it was killed."""
        ...

    def kill(self) -> None:
        """SIGKILL to it and all that it started."""
        ...


class Sandbox(ABC):
    """Has no network, a read-only system, and files of its own; `async with` opens and closes it.

    Commands see the same files, and not each other: what one started ends with it. EnvFailure
    where the sandbox itself is lost.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    @abstractmethod
    async def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = WORK,
        seconds: float | None = None,
        output_bytes: int | None = None,
    ) -> Outcome:
        """Runs a command to its end, or to its deadline, and ends all that it started.

        Given up, it is killed likewise. `env` is added to PATH, HOME and LANG.
        """

    @abstractmethod
    async def start(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = WORK
    ) -> Started:
        """Starts a command that goes on until it ends, is killed, or the sandbox is closed."""

    @abstractmethod
    async def aclose(self) -> None:
        """Kills everything in it, and waits until it has ended; its files are gone."""

    async def write(self, path: str, data: bytes) -> None:
        """A file, and the folders above it; relative paths are in /work.

        It is written from inside: links lead nowhere else.
        """
        script = 'mkdir -p -- "$(dirname -- "$1")" && exec cat > "$1"'
        await self._files(path, ["/bin/sh", "-c", script, "sh", _operand(path)], stdin=data)

    async def read(self, path: str) -> bytes:
        """All of a file, as is seen from inside."""
        limit = self.limits.disk_mb << 20
        return await self._files(path, ["/bin/cat", "--", _operand(path)], output_bytes=limit)

    async def copy_in(self, folder: Path, path: str = WORK) -> None:
        """What a folder of this machine holds, to a folder there, which is made if need be.

        Links are copied as links.
        """
        packed = await asyncio.to_thread(_packed, folder)
        script = 'mkdir -p -- "$1" && exec tar -x --no-same-owner -C "$1"'
        await self._files(path, ["/bin/sh", "-c", script, "sh", _operand(path)], stdin=packed)

    async def _files(
        self, path: str, argv: Sequence[str], *, stdin: bytes = b"", output_bytes: int | None = None
    ) -> bytes:
        outcome = await self.run(argv, stdin=stdin, output_bytes=output_bytes)
        if outcome.returncode != 0 or outcome.cut:
            why = outcome.stderr.decode(errors="replace").strip() or outcome.ended
            raise FileFailure(
                f"{path!r} in the sandbox: {'it is too large' if outcome.cut else why}"
            )
        return outcome.stdout


def _operand(path: str) -> str:
    """A path that no command takes for an option."""
    return path if path.startswith("/") else f"./{path}"


def _packed(folder: Path) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        archive.add(folder, arcname=".")
    return packed.getvalue()
