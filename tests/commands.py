"""Commands that a test starts, which do not outlive it."""

import asyncio
import contextlib
import os
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

FLASH = Path(sys.executable).with_name("flash")


@contextlib.asynccontextmanager
async def started(*words: object, inside: tuple[object, ...] = ()) -> AsyncIterator[Process]:
    """A command, started by another one if there is `inside`, and killed in the end if it runs."""
    process = await asyncio.create_subprocess_exec(
        *map(str, inside), *map(str, words),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def flash(*words: object, inside: tuple[object, ...] = ()) -> AbstractAsyncContextManager[Process]:
    """`flash`, as this Python has it."""
    return started(FLASH, *words, inside=inside)


class Lines:
    """What a command says, line by line, as it comes; until `close`."""

    def __init__(self, process: Process) -> None:
        self.said: list[str] = []
        self._more = asyncio.Condition()
        self._reading = asyncio.create_task(self._read(process))

    async def until(self, words: str, *, after: int = 0) -> None:
        """Waits for one with these words, after so many."""
        async with self._more:
            while not any(words in line for line in self.said[after:]):
                assert not self._reading.done(), f"no line has {words!r}: {self}"
                await self._more.wait()

    async def end(self) -> None:
        """Waits for the last one."""
        await asyncio.wait((self._reading,))

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.wait((self._reading,))

    async def _read(self, process: Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            await self._note(line.decode().rstrip())
        await self._note("")  # whoever waits finds out that it is the end

    async def _note(self, line: str) -> None:
        async with self._more:
            self.said.append(line)
            self._more.notify_all()

    def __str__(self) -> str:
        return "\n".join(self.said).strip()
