"""Evaluations in the background of a run: one at a time, and none of them ends it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Self

from flash.errors import FlashError, first_error
from flash.evaluation.result import Evaluation

logger = logging.getLogger(__name__)


class BackgroundEvaluation:
    """Holds the evaluation that runs beside the block; leaving the block waits for it.

    `told` is called with each evaluation that came to its end. One that fails is logged, and so is
    one that is due while another still runs, and is left out. An error that is no FlashError
    cancels the block and comes out of it.
    """

    def __init__(self, told: Callable[[Evaluation], None]) -> None:
        self._told = told
        self._tasks = asyncio.TaskGroup()
        self._running: tuple[int, asyncio.Task[None]] | None = None

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if exc_info[0] is not None:
            self.cancel()
        with first_error():
            await self._tasks.__aexit__(None, None, None)

    def begin(self, version: int, evaluate: Callable[[], Awaitable[Evaluation]]) -> None:
        """Starts the evaluation of that version, unless one runs."""
        if self._running is not None:
            logger.warning(
                "the evaluation of version %d is left out: that of version %d still runs",
                version,
                self._running[0],
            )
            return
        task = self._tasks.create_task(self._run(version, evaluate), name=f"evaluate {version}")
        self._running = version, task

    async def finish(self) -> None:
        """Waits for the one that runs."""
        if self._running is not None:
            await asyncio.wait((self._running[1],))

    def cancel(self) -> None:
        """Gives up the one that runs."""
        if self._running is not None:
            self._running[1].cancel()

    async def _run(self, version: int, evaluate: Callable[[], Awaitable[Evaluation]]) -> None:
        try:
            self._told(await evaluate())
        except FlashError as error:
            logger.warning("the evaluation of version %d is lost: %s", version, error)
        finally:
            self._running = None
