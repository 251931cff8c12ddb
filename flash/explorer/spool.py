"""Where an explorer keeps what it finished while nobody could be told: a file an episode.

One that its controller has settled is removed. What is found at a start was finished by a start
before, of the same name.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from flash.explorer.messages import UNREADABLE, Step, decoder, encoder
from flash.system.durable import write_whole

logger = logging.getLogger(__name__)


class Spooled(msgspec.Struct, frozen=True):
    """An episode that came to its end: of which run, and given by which start of its controller."""

    run: str
    controller: str
    episode: int
    steps: list[Step]


class Spool:
    """Writes in one thread, in order; `close` waits for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, "spool")
        self._loop = asyncio.get_running_loop()
        self._troubled = False

    def load(self) -> list[Spooled]:
        """All that is kept. Blocks."""
        found: list[Spooled] = []
        decode = decoder(Spooled).decode
        for path in sorted(self._folder.glob("*.msgpack")):
            try:
                found.append(decode(path.read_bytes()))
            except (OSError, *UNREADABLE) as error:
                logger.warning("%s can't be read, and is left out: %s", path, error)
        return found

    def add(self, spooled: Spooled) -> None:
        """Soon it outlives the process."""
        self._soon(lambda: self._write(spooled))

    def remove(self, controller: str, episode: int) -> None:
        path = self._path(controller, episode)
        self._soon(lambda: path.unlink(missing_ok=True))

    async def close(self) -> None:
        await self._loop.run_in_executor(None, self._thread.shutdown)

    def _write(self, spooled: Spooled) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(spooled.controller, spooled.episode)
        write_whole(path, encoder.encode(spooled))

    def _path(self, controller: str, episode: int) -> Path:
        return self._folder / f"{controller}-{episode}.msgpack"

    def _soon(self, write: Callable[[], None]) -> None:
        def writing() -> None:
            try:
                write()
            except OSError as error:  # then it is kept in memory alone
                if not self._troubled:
                    logger.warning("finished episodes can't be kept on disk: %s", error)
                self._troubled = True

        with contextlib.suppress(RuntimeError):  # it is closed
            self._thread.submit(writing)
