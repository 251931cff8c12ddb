"""Commands under a guard (`guard.py`), which ends them with everything that they started."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from flash.system.shortage import when_there_is_room

_GUARD = Path(__file__).with_name("guard.py")
_START_TIMEOUT_S = 60.0  # for a machine that lacks processes or files
_END_GRACE_S = 5.0  # more than a guard takes


class Guarded:
    """A command and its guard; made by `start_guarded`.

    When `kill` is called, or this process dies, the command ends with everything that it started;
    when the command ends, so does what it left behind. Then the guard ends, with the command's
    exit code as a shell tells it.
    """

    def __init__(self, guard: asyncio.subprocess.Process, lifeline: int) -> None:
        self._guard = guard
        self._lifeline: int | None = lifeline

    @property
    def pid(self) -> int:
        """Of the guard."""
        return self._guard.pid

    async def wait(self) -> int:
        """The exit code, once all of it has ended by itself."""
        return await self._guard.wait()

    def terminate(self) -> None:
        """SIGTERM to the command alone, which may take its time; nothing if it has ended."""
        if self._lifeline is not None:
            with contextlib.suppress(BrokenPipeError):
                os.write(self._lifeline, b"t")

    def kill(self) -> None:
        """Has the guard end all of it; `end` waits until it has."""
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None

    async def end(self) -> int:
        """The exit code, once all of it has been ended; also where the guard can't do it."""
        self.kill()
        try:
            async with asyncio.timeout(_END_GRACE_S):
                return await self._guard.wait()
        except TimeoutError:  # somebody has stopped it
            await asyncio.to_thread(_kill_family, self.pid)
            return await self._guard.wait()


async def start_guarded(
    *command: str,
    stdout: IO[bytes],
    stderr: IO[bytes],
    env: Mapping[str, str],
    pass_fds: Sequence[int] = (),
    cwd: str | None = None,
) -> Guarded:
    """Starts a command under a guard. OSError if this machine can't, for a minute."""

    async def start() -> Guarded:
        reading, lifeline = os.pipe()
        try:
            guard = await asyncio.create_subprocess_exec(
                sys.executable,
                "-IS",
                str(_GUARD),
                str(reading),
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                pass_fds=[reading, *pass_fds],
                env=env,
                cwd=cwd,
                start_new_session=True,
            )
        except BaseException:
            os.close(lifeline)
            raise
        finally:
            os.close(reading)
        return Guarded(guard, lifeline)

    return await when_there_is_room(start, within_s=_START_TIMEOUT_S)


def _kill_family(pid: int) -> None:
    """SIGKILL to a process and all below it, from the leaves, while it is known whose they are."""
    with contextlib.suppress(psutil.NoSuchProcess):
        guard = psutil.Process(pid)
        for process in (*reversed(guard.children(recursive=True)), guard):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
