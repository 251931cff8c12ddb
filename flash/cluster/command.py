"""A command of ours in an actor: told of line by line, asked to end, ended with the actor."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import IO, Literal

from flash.system.guarded import Guarded, start_guarded

Stream = Literal["out", "err"]
Tell = Callable[[Stream, str], None]

_LONGEST_LINE = 1 << 20


class Command:
    """Runs one command after another; `terminate` goes to the one that runs."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._running: Guarded | None = None

    async def run(self, command: Sequence[str], *, env: Mapping[str, str], cwd: str | None) -> int:
        """Its exit code, as a shell tells it. If this is cancelled, it is killed."""
        async with _piped(self._tell, "out") as out, _piped(self._tell, "err") as err:
            with out, err:
                guarded = await start_guarded(*command, stdout=out, stderr=err, env=env, cwd=cwd)
            self._running = guarded
            try:
                return await guarded.wait()
            finally:
                self._running = None
                await asyncio.shield(guarded.end())

    def terminate(self) -> None:
        """Asks it to end in its own time; nothing if none runs."""
        if self._running is not None:
            self._running.terminate()


@contextlib.asynccontextmanager
async def _piped(tell: Tell, stream: Stream) -> AsyncIterator[IO[bytes]]:
    """What is written to it is told by lines, all of it before the block is left."""
    reading, writing = os.pipe()
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=_LONGEST_LINE)
    transport, _ = await loop.connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(reading, "rb")
    )
    telling = asyncio.create_task(_tell_lines(reader, tell, stream), name=f"std{stream}")
    file = os.fdopen(writing, "wb")
    try:
        yield file
        await telling
    finally:
        file.close()
        telling.cancel()
        transport.close()


async def _tell_lines(reader: asyncio.StreamReader, tell: Tell, stream: Stream) -> None:
    while line := await reader.readline():
        tell(stream, line.decode(errors="replace").rstrip("\n"))
