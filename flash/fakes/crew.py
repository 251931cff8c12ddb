"""A crew without agents and without a hub: its episodes only take time."""

import asyncio
from collections.abc import Callable
from typing import Self

from flash.rollout.episode import Cancelled, Episode, EpisodeEnd, Generator, Witness
from flash.rollout.history import History
from flash.types import Task, Trajectory


class FakeCrew:
    """Ends each episode after some seconds, with what `play` makes of it; for tests of a loop.

    Args:
        hub: what episodes are made with; nothing is asked of it.
        play: the end of an episode that was not given up.
        seconds: how long it takes.
    """

    waits_for = ""

    def __init__(
        self,
        hub: Generator,
        play: Callable[[Episode], EpisodeEnd],
        *,
        seconds: Callable[[Episode], float] = lambda episode: 1.0,
    ) -> None:
        self.crashes = 0
        self.begun: list[Episode] = []
        self._hub = hub
        self._play = play
        self._seconds = seconds
        self._timers: dict[Episode, asyncio.TimerHandle] = {}

    def report_to(
        self,
        *,
        on_end: Callable[[Episode, EpisodeEnd], None],
        on_fatal: Callable[[Exception], None],
        witness: Witness | None = None,
        oldest_wanted: Callable[[], int] = lambda: 0,
    ) -> None:
        self._on_end, self._on_fatal, self._witness = on_end, on_fatal, witness

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for episode in list(self._timers):
            self._end(episode, Cancelled())

    def begin(
        self,
        episode_id: int,
        task: Task,
        *,
        group: int = -1,
        attempt: int = 1,
        history: History = (),
        continues: int | None = None,
    ) -> Episode:
        episode = Episode(
            episode_id,
            task,
            hub=self._hub,
            group=group,
            attempt=attempt,
            history=history,
            continues=continues,
            witness=self._witness,
        )
        self.begun.append(episode)
        loop = asyncio.get_running_loop()
        self._timers[episode] = loop.call_later(self._seconds(episode), self._finish, episode)
        return episode

    def give_up(self, episode: Episode, reason: str) -> None:
        if episode in self._timers and episode.cancel_reason is None:
            episode.cancel_reason = reason
            asyncio.get_running_loop().call_soon(self._end, episode, Cancelled())

    def episodes(self) -> list[Episode]:
        return list(self._timers)

    def fail(self, error: Exception) -> None:
        """As a crew does whose link is lost."""
        self._on_fatal(error)

    def _finish(self, episode: Episode) -> None:
        self._end(episode, self._play(episode))

    def _end(self, episode: Episode, end: EpisodeEnd) -> None:
        if episode in self._timers:
            self._timers.pop(episode).cancel()
            if isinstance(end, Trajectory):
                episode.turns = end.turns
            self._on_end(episode, end)
