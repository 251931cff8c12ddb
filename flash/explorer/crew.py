"""The crew of a run with explorers: episodes are played where there is room, here or there."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Self

from flash.explorer.fleet import Fleet
from flash.explorer.remote import RemoteEpisode
from flash.explorer.seat import Play
from flash.rollout.committed import SHUTDOWN
from flash.rollout.crew import AgentCrew
from flash.rollout.episode import Cancelled, Episode, EpisodeEnd, Generator, Witness
from flash.rollout.history import History
from flash.types import Task

_GRACE_S = 10.0


class FleetCrew:
    """A Crew over a fleet, and over agents of this process if there are workers here.

    Args:
        hub: what episodes that are played here ask.
        local, room: the agents of this process, and how many more episodes they can have in hand.
        together: as for AgentCrew.
        heldout: the episodes are of an evaluation.
        version: what is older must not sample; by default that is the caller's to say.
    """

    def __init__(
        self,
        fleet: Fleet,
        hub: Generator,
        *,
        local: AgentCrew | None = None,
        room: Callable[[], int] = lambda: 0,
        together: bool = False,
        heldout: bool = False,
        version: Callable[[], int] | None = None,
    ) -> None:
        self._fleet = fleet
        self._hub = hub
        self._local = local
        self._room = room
        self._together = together
        self._heldout = heldout
        self._version = version
        self._plays: dict[int, Play] = {}
        self._left = asyncio.Event()

    @property
    def crashes(self) -> int:
        return 0 if self._local is None else self._local.crashes

    @property
    def waits_for(self) -> str:
        return self._fleet.placing.waits_for(heldout=self._heldout, here=self._local is not None)

    def report_to(
        self,
        *,
        on_end: Callable[[Episode, EpisodeEnd], None],
        on_fatal: Callable[[Exception], None],
        witness: Witness | None = None,
        oldest_wanted: Callable[[], int] = lambda: 0,
    ) -> None:
        self._on_end, self._on_fatal = on_end, on_fatal
        self._witness, self._oldest_wanted = witness, self._version or oldest_wanted
        if self._local is not None:
            self._local.report_to(on_end=self._end, on_fatal=on_fatal, witness=witness)

    async def __aenter__(self) -> Self:
        self._fleet.on_fatal.append(self._on_fatal)
        if self._local is not None:
            await self._local.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """All are given up; explorers have as long as agents to say so."""
        for play in list(self._plays.values()):
            self.give_up(play.episode, SHUTDOWN)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_GRACE_S):
                    while any(play.explorer is not None for play in self._plays.values()):
                        self._left.clear()
                        await self._left.wait()
        finally:  # also if that wait is cancelled
            for play in [play for play in self._plays.values() if not play.here]:
                self._fleet.drop(play)
                self._end(play.episode, Cancelled())
            self._fleet.on_fatal.remove(self._on_fatal)
            if self._local is not None:
                await self._local.__aexit__(*exc_info)

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
        episode = RemoteEpisode(
            episode_id,
            task,
            hub=self._hub,
            group=group,
            attempt=attempt,
            together=self._together,
            history=history,
            continues=continues,
            witness=self._witness,
        )
        here = None if task.task_set in self._fleet.brought else self._local
        play = Play(
            episode=episode,
            heldout=self._heldout,
            history=history,
            oldest_wanted=self._oldest_wanted,
            room_here=self._room,
            play_here=None if here is None else here.play,
            on_end=self._end,
        )
        self._plays[episode_id] = play
        self._fleet.begin(play)
        return episode

    def give_up(self, episode: Episode, reason: str) -> None:
        if episode.cancel_reason is not None or episode.id not in self._plays:
            return
        play = self._plays[episode.id]
        if play.here:
            assert self._local is not None
            self._local.give_up(episode, reason)
        else:
            episode.cancel_reason = reason
            self._fleet.give_up(play)

    def episodes(self) -> list[Episode]:
        return [play.episode for play in self._plays.values()]

    def _end(self, episode: Episode, end: EpisodeEnd) -> None:
        if self._plays.pop(episode.id, None) is None:
            return  # nobody waits for it any more
        self._left.set()
        try:
            self._on_end(episode, end)
        except Exception as error:  # its caller here is a connection, which has no part in it
            self._on_fatal(error)
