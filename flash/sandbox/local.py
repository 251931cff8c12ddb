"""Sandboxes of this machine, by bubblewrap and the kernel's namespaces."""

import asyncio
import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, Self

from flash.errors import EnvFailure, one_line
from flash.sandbox.bubblewrap import FOLDERS, check_installed, command_line, python_path, seen_of
from flash.sandbox.inside import HEADER
from flash.sandbox.memory import MemoryGroup
from flash.sandbox.sandbox import WORK, Limits, Outcome, Sandbox, SandboxUnavailable
from flash.system.shortage import when_there_is_room

_START_TIMEOUT_S = 60.0
_GRACE_S = 15.0  # more than the kernel takes to end all of a command, on a busy machine
_ENVIRONMENT = {"PATH": python_path(), "HOME": "/tmp", "LANG": "C.UTF-8"}
_OPEN_FILES = 1024
_LINE_BYTES = 1 << 20  # of a command that goes on, the longest line that can be read as one
_OWN_PROCESSES = 3  # of `inside.py`, beside a command's


def check_local() -> None:
    """Opens a sandbox and runs a command. Raises SandboxUnavailable if that can't be done."""
    check_installed()

    async def try_one() -> None:
        async with LocalSandbox(Limits()) as sandbox:
            outcome = await sandbox.run(["true"])
            if outcome.returncode != 0:
                said = outcome.stderr.decode(errors="replace")
                raise EnvFailure(f"no command runs in it: {said or outcome.ended}")

    try:
        with ThreadPoolExecutor(1) as thread:  # where no event loop runs yet
            thread.submit(asyncio.run, try_one()).result()
    except EnvFailure as failure:
        raise SandboxUnavailable(
            f"this machine can't have a local sandbox: {failure}: allow user namespaces (`sysctl "
            f"kernel.unprivileged_userns_clone=1`, `sysctl kernel.apparmor_restrict_"
            f"unprivileged_userns=0`; in a container `--privileged`, or a seccomp profile that "
            f"allows them), and let everybody read this Python's folders"
        ) from failure


class LocalSandbox(Sandbox):
    """One bubblewrap with `inside.py` in it, which runs the commands.

    It ends with the thread that entered it, at the latest.

    Args:
        readable: files and folders of this machine that are seen in it, at their own paths.
        writable: folders at its root that may be written to, beside those of each.
    """

    def __init__(
        self, limits: Limits, readable: Sequence[Path] = (), writable: Sequence[str] = ()
    ) -> None:
        super().__init__(limits)
        self._readable = readable
        self._writable = writable
        self._control: socket.socket | None = None  # each message is the descriptors of a command
        self._process: asyncio.subprocess.Process | None = None
        self._memory: MemoryGroup | None = None
        self._started: list[LocalStarted] = []

    async def __aenter__(self) -> Self:
        try:
            self._memory = MemoryGroup.make(self.limits.memory_mb << 20)
            with _lost(), tempfile.TemporaryFile() as stderr:
                async with asyncio.timeout(_START_TIMEOUT_S):
                    await when_there_is_room(partial(self._open, stderr))
                    await self._ready(stderr)
        except BaseException:
            await self.aclose()
            raise
        return self

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
        seconds = self.limits.seconds if seconds is None else seconds
        request = _request(argv, env, cwd) | {
            "seconds": seconds,
            "output_bytes": self.limits.output_bytes if output_bytes is None else output_bytes,
        }
        kills_before = self._kills()
        with _lost():
            async with asyncio.timeout(seconds + _GRACE_S):
                asked = await _Asked.ask(self._control, request, stdin)
                try:
                    answer, (stdout, stderr) = await asked.answer()
                finally:
                    asked.close()
        return Outcome(
            returncode=answer["returncode"],
            stdout=stdout,
            stderr=stderr,
            ended=answer["ended"] if self._kills() == kills_before else "memory",
            cut=answer["cut"],
        )

    async def start(
        self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = WORK
    ) -> "LocalStarted":
        request = _request(argv, env, cwd) | {"seconds": None}
        pipes = [os.pipe() for _ in range(3)]
        theirs = (pipes[0][0], pipes[1][1], pipes[2][1])
        with contextlib.ExitStack() as failing:
            files = [
                failing.enter_context(os.fdopen(end, mode, buffering=0))
                for end, mode in ((pipes[0][1], "wb"), (pipes[1][0], "rb"), (pipes[2][0], "rb"))
            ]
            try:
                with _lost():
                    asked = await _Asked.ask(self._control, request, streams=theirs)
            finally:
                for end in theirs:
                    os.close(end)
            failing.callback(asked.close)
            started = await LocalStarted.attend(asked, *files)
            failing.pop_all()
        self._started.append(started)
        return started

    async def aclose(self) -> None:
        if self._control is not None:
            self._control.close()  # at which its first process ends, and with it all others
        for started in self._started:
            started.close()
        self._started.clear()
        if self._process is not None:
            try:
                async with asyncio.timeout(_GRACE_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._memory is not None:
            await self._memory.remove()
            self._memory = None

    def _kills(self) -> int:
        return 0 if self._memory is None else self._memory.kills

    async def _open(self, stderr: IO[bytes]) -> None:
        limits, seen, memory = self.limits, seen_of(self._readable), self._memory
        folders = list(dict.fromkeys((*FOLDERS, *self._writable)))
        rlimits = {
            "RLIMIT_NPROC": limits.processes + _OWN_PROCESSES,
            "RLIMIT_FSIZE": limits.disk_mb << 20,
            "RLIMIT_NOFILE": _OPEN_FILES,
            "RLIMIT_CORE": 0,
        }
        if memory is None:
            rlimits["RLIMIT_AS"] = limits.memory_mb << 20
        argument = {
            "readable": list(map(str, seen)),
            "folders": folders,
            "disk_mb": limits.disk_mb,
            "rlimits": rlimits,
        }
        if self._control is not None:  # of an attempt before
            self._control.close()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        line = command_line(
            json.dumps(argument),
            seen=seen,
            folders=folders,
            joins=None if memory is None else memory.members,
        )
        with theirs, line as (command, descriptors):
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=theirs.fileno(),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=stderr,
                pass_fds=descriptors,
                env={"PATH": os.environ.get("PATH", os.defpath)},
            )

    async def _ready(self, stderr: IO[bytes]) -> None:
        assert self._control is not None
        assert self._process is not None
        if not await asyncio.get_running_loop().sock_recv(self._control, 1):
            await self._process.wait()
            stderr.seek(0)
            said = stderr.read().decode(errors="replace")
            raise EnvFailure(f"the sandbox can't be opened: {' '.join(said.split())}")


class LocalStarted:
    """As `Started`."""

    def __init__(
        self,
        asked: "_Asked",
        stdin: asyncio.StreamWriter,
        stdout: asyncio.StreamReader,
        stderr: asyncio.StreamReader,
        transports: Sequence[asyncio.BaseTransport],
    ) -> None:
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self._asked = asked
        self._transports = transports

    @classmethod
    async def attend(cls, asked: "_Asked", stdin: IO[bytes], *outputs: IO[bytes]) -> Self:
        """With our ends of its pipes."""
        loop = asyncio.get_running_loop()
        nothing, stdout, stderr = (asyncio.StreamReader(limit=_LINE_BYTES) for _ in range(3))
        writing, protocol = await loop.connect_write_pipe(
            partial(asyncio.StreamReaderProtocol, nothing), stdin
        )
        transports: list[asyncio.BaseTransport] = [writing]
        for reader, pipe in zip((stdout, stderr), outputs, strict=True):
            reading, _ = await loop.connect_read_pipe(
                partial(asyncio.StreamReaderProtocol, reader), pipe
            )
            transports.append(reading)
        writer = asyncio.StreamWriter(writing, protocol, nothing, loop)
        return cls(asked, writer, stdout, stderr, transports)

    async def wait(self) -> int | None:
        with _lost():
            answer, _ = await self._asked.answer()
        returncode: int | None = answer["returncode"]
        return returncode

    def kill(self) -> None:
        self._asked.abandon()

    def close(self) -> None:
        """Gives up all that is held for it."""
        self._asked.close()
        for transport in self._transports:
            transport.close()


class _Asked:
    """What one command was asked for, and its answer to come."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def ask(
        cls,
        control: socket.socket | None,
        request: Mapping[str, Any],
        stdin: bytes = b"",
        *,
        streams: Sequence[int] = (),
    ) -> "_Asked":
        assert control is not None, "it has been entered"
        ours, theirs = socket.socketpair()

        async def send() -> None:
            socket.send_fds(control, [b"c"], [theirs.fileno(), *streams])

        try:
            with theirs:
                await when_there_is_room(send, within_s=_GRACE_S)
            reader, writer = await asyncio.open_unix_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        header = json.dumps({**request, "stdin_bytes": len(stdin)}).encode()
        writer.writelines([HEADER.pack(len(header)), header, stdin])
        return cls(reader, writer)

    async def answer(self) -> tuple[Mapping[str, Any], list[bytes]]:
        """How it ended, and what it wrote."""
        await self._writer.drain()
        (length,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
        answer = json.loads(await self._reader.readexactly(length))
        return answer, [await self._reader.readexactly(size) for size in answer["sizes"]]

    def abandon(self) -> None:
        """Has it killed; it still answers."""
        self._writer.write_eof()

    def close(self) -> None:
        """Has it killed, if it goes on."""
        self._writer.close()


def _request(argv: Sequence[str], env: Mapping[str, str] | None, cwd: str) -> dict[str, Any]:
    return {"argv": list(argv), "env": {**_ENVIRONMENT, **(env or {})}, "cwd": cwd}


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    """EnvFailure for a sandbox that does not answer."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise EnvFailure(f"the sandbox was lost: {one_line(error)}") from error
