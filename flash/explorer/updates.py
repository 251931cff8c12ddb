"""New weights go to explorers, and their workers are compared with the trainer.

publish ──► all that are here, but who plays an evaluation: it catches up after it
              └─► Score: what a worker sampled ──► the trainer, while it has time ──► Scored
compared ─► waits for those that it had no time for
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping

from flash.errors import FlashError
from flash.explorer.messages import Publish, Score, Scored
from flash.explorer.seat import Explorer
from flash.types import Scores


class Updates:
    """Which weights explorers are told of, and whether their workers compute with them as it does.

    Args:
        explorers: those that are here, or away.
        first: the weights of the model itself; None if every explorer has them by its name.
        published: those that were published last; None if they are what workers start with.
        score: the trainer's logprobs of tokens at a version, or None.
        exam_waits: whether an episode waits that evaluators alone may play.
    """

    def __init__(
        self,
        explorers: Mapping[str, Explorer],
        *,
        first: Publish | None,
        published: Callable[[], Publish | None],
        score: Callable[[Score], Awaitable[Scores | None]] | None,
        exam_waits: Callable[[], bool],
    ) -> None:
        self._explorers = explorers
        self._first = first
        self._published = published
        self._score = score
        self._exam_waits = exam_waits
        self._due: set[Explorer] = set()  # that `compared` waits for
        self._none_due = asyncio.Event()

    @property
    def newest(self) -> Publish | None:
        """For one that comes. One that is back from an earlier start may lack those that this one
        began with, and could play nothing until there are newer ones."""
        return self._published() or self._first

    def publish(self, message: Publish) -> None:
        """Tells all that are here of new weights."""
        for explorer in self._explorers.values():
            if not self.is_examined(explorer):
                explorer.send(message)

    def is_examined(self, explorer: Explorer) -> bool:
        """Whether the weights that it has are what an evaluation is of."""
        return explorer.evaluates and (bool(explorer.plays) or self._exam_waits())

    def catch_up(self) -> None:
        """Gives evaluators the weights that came out while an evaluation was played."""
        newest = self.newest
        if newest is None:
            return
        for explorer in self._explorers.values():
            if explorer.evaluates and not self.is_examined(explorer):
                explorer.send(newest)

    async def answer(self, explorer: Explorer, question: Score) -> None:
        """Tells it what the trainer says, or that it has no time."""
        scores = None
        with contextlib.suppress(FlashError):  # the trainer's, of which others tell
            if self._score is not None:
                scores = await self._score(question)
        if scores is None:
            explorer.send(Scored(question.number, None))
            return
        explorer.compared = True
        self.is_not_due(explorer)
        logprobs = [list(map(float, each)) for each in scores.logprobs]
        explorer.send(Scored(question.number, logprobs, scores.largest_logit))

    async def compared(self, *, within_s: float) -> None:
        """Waits until those that have weights have been answered, unless they were since the last
        call, or are gone."""
        self._due = {
            explorer
            for explorer in self._explorers.values()
            if not (explorer.compared or explorer.link is None or self.is_examined(explorer))
            and explorer.version >= 0
        }
        if self._due:
            self._none_due.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._none_due.wait()
        for explorer in self._explorers.values():
            explorer.compared = False

    def is_not_due(self, explorer: Explorer) -> None:
        """It was answered, or is gone."""
        self._due.discard(explorer)
        if not self._due:
            self._none_due.set()
