"""What an explorer plays for its controller, and has played and not handed over.

    Begin ─► AgentCrew ─► steps ─► News, while there is a link
                            └─► kept until Settled; on disk, if it has ended and there is no link

Each link begins anew: `holds` is what Hello says, and Welcome tells what of that goes on, and
which of its steps are known.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flash.errors import EpisodeFailure
from flash.explorer.link import Link
from flash.explorer.messages import (
    Anew,
    Began,
    Begin,
    Ended,
    FromController,
    Holding,
    Leaving,
    News,
    Returned,
    Room,
    Said,
    State,
    Step,
    Told,
    Welcome,
    exact,
    history_of,
    sent,
)
from flash.explorer.spool import Spooled
from flash.hub.reports import HubStats
from flash.rollout.crew import AgentCrew
from flash.rollout.episode import Episode, EpisodeEnd
from flash.rollout.history import Sampled
from flash.types import Observation, Trajectory

logger = logging.getLogger(__name__)

_TELLS_EVERY_S = 1.0


@dataclass(slots=True, eq=False)
class _Held:
    """An episode: whose, what happened in it, and how much of that the controller knows."""

    run: str
    controller: str
    number: int
    steps: list[Step] = field(default_factory=list)
    told: int = 0
    ended: bool = False
    crew: AgentCrew | None = None  # that plays it, while it does
    episode: Episode | None = None
    wanted: bool = True
    spooled: bool = False
    oldest: int | None = None  # as told
    stage: str = ""  # as told


class Spool(Protocol):
    """What the player keeps what it finished in, where nobody can be told."""

    def load(self) -> list[Spooled]: ...

    def add(self, spooled: Spooled) -> None: ...

    def remove(self, controller: str, episode: int) -> None: ...


class Player:
    """Plays what is begun with its crews, once it has some.

    `spool` is for what must outlive a link, and this process.
    """

    def __init__(self, spool: Spool) -> None:
        self._run = ""
        self._spool = spool
        self._held: dict[tuple[str, int], _Held] = {}
        self._by_local: dict[int, _Held] = {}
        self._next_local = 0
        self._crews: Mapping[bool, AgentCrew] = {}
        self._link: Link[FromController] | None = None
        self._controller = ""
        self._unsent: dict[_Held, None] = {}
        self._begun = 0
        self._room_told: tuple[int, int, int] | None = None
        self._leaving = False
        self._changed = asyncio.Event()
        self.doing = "starts"

    # ── its crews ────────────────────────────────────────────────────────────────────────────

    def use(
        self,
        crews: Mapping[bool, AgentCrew],
        *,
        room: Callable[[], int],
        version: Callable[[], int],
        stats: Callable[[], HubStats],
        on_fatal: Callable[[Exception], None],
    ) -> None:
        """From now on it plays with these: of training, of evaluations (True).

        `room`: how many more episodes they can have in hand; `version`, `stats`: of their hub.
        """
        self._crews, self._room, self._version, self._stats = crews, room, version, stats
        for crew in crews.values():
            crew.report_to(on_end=self._on_end, on_fatal=on_fatal, witness=_Witness(self))
        self.doing = ""

    @property
    def version(self) -> int:
        """Of its hub; -1 before it has one."""
        return self._version() if self._crews else -1

    @property
    def running(self) -> int:
        """Episodes that have not come to their end."""
        return len(self._by_local)

    # ── its link ─────────────────────────────────────────────────────────────────────────────

    def load(self) -> None:
        """What an earlier start of this explorer finished. Blocks."""
        for spooled in self._spool.load():
            held = _Held(
                spooled.run,
                spooled.controller,
                spooled.episode,
                spooled.steps,
                ended=True,
                spooled=True,
            )
            self._held[held.controller, held.number] = held

    def holds(self) -> list[Holding]:
        return [
            Holding(held.run, held.controller, held.number, len(held.steps), held.ended)
            for held in self._held.values()
            if held.wanted
        ]

    def attach(self, link: Link[FromController], welcome: Welcome) -> None:
        """A controller that has said what it wants of what is held."""
        kept = {(keep.held.controller, keep.held.episode): keep for keep in welcome.keeps}
        controller = welcome.controller
        before, self._held = self._held, {}
        for key, held in before.items():
            keep = kept.get(key)
            if keep is None:
                if held.run == welcome.run or not held.ended:  # else it waits on disk for its own
                    self._forget(held)
                continue
            if held.controller != controller:
                held.controller = controller
                if held.spooled:
                    self._keep(held)
                    self._spool.remove(*key)
            held.told = keep.first
            self._held[controller, held.number] = held
            self._unsent[held] = None
        self._link, self._run, self._controller = link, welcome.run, controller
        self._begun, self._room_told = 0, None
        link.before_frame = self._tell
        if self._leaving:
            link.send(Leaving())
        self.tell_state()

    def detach(self) -> None:
        """The link is lost: what has ended must not be lost with this process."""
        self._link = None
        self._unsent.clear()
        for held in list(self._held.values()):
            if held.ended:
                self._keep(held)

    def leave(self) -> None:
        """Takes nothing more."""
        self._leaving = True
        if self._link is not None:
            self._link.send(Leaving())

    def say_goodbye(self) -> None:
        """Nothing is held any more."""
        if self._link is not None:
            self._link.send(Leaving(done=True))

    def hand_back(self) -> None:
        """What is not at its end is not played to it here, nor is anything until it has crews."""
        self._crews = {}
        running = [held for held in self._held.values() if not held.ended]
        if self._link is not None:
            self._tell()
            self._link.send(Returned([held.number for held in running]))
        for held in running:
            self._forget(held)
            self._held.pop((held.controller, held.number), None)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for that of what it holds or runs."""
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    @property
    def empty(self) -> bool:
        return not self._held

    # ── what the controller says ─────────────────────────────────────────────────────────────

    def begin(self, message: Begin) -> None:
        self._begun += 1
        if self._leaving or not self._crews:  # it was on its way when that was told
            assert self._link is not None
            self._link.send(Returned([message.episode]))
            return
        crew = self._crews[message.heldout]
        held = _Held(self._run, self._controller, message.episode, crew=crew)
        local, self._next_local = self._next_local, self._next_local + 1
        self._held[held.controller, held.number] = self._by_local[local] = held
        held.episode = crew.begin(
            local,
            message.task,
            group=message.group,
            attempt=message.attempt,
            history=history_of(message.history),
        )

    def give_up(self, number: int, reason: str) -> None:
        held = self._held.get((self._controller, number))
        if held is not None and not held.ended:
            _give_up(held, reason)

    def settled(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            held = self._held.pop((self._controller, number), None)
            if held is not None:
                self._forget(held)

    # ── what it tells ────────────────────────────────────────────────────────────────────────

    def add(self, episode: Episode, step: Step) -> None:
        """One more step of an episode that runs here."""
        held = self._by_local.get(episode.id)
        if held is None or not held.wanted:
            return
        held.steps.append(step)
        held.ended = isinstance(step, Ended)
        if self._link is not None:
            self._unsent[held] = None
            self._link.poke(soon=held.ended)
        elif held.ended:
            self._keep(held)

    async def tell_often(self) -> None:
        """How it stands, again and again."""
        while True:
            self.tell_state()
            await asyncio.sleep(_TELLS_EVERY_S)

    def tell_state(self) -> None:
        if self._link is None:
            return
        stages: dict[int, str] = {}
        for held in self._by_local.values():
            episode = held.episode
            if episode is None:
                continue
            if episode.oldest_version is not None and episode.oldest_version != held.oldest:
                held.oldest = episode.oldest_version
                self.add(episode, Began(held.oldest))
            if episode.stage_name != held.stage:
                held.stage = stages[held.number] = episode.stage_name
        stats = self._stats() if self._crews else None
        self._link.send(State(self.doing, stats, stages))

    def _tell(self) -> None:
        """Before each frame: all steps that are new, and the room there is."""
        if self._link is None:
            return
        unsent, self._unsent = self._unsent, {}
        for held in unsent:
            if held.wanted and held.told < len(held.steps):
                self._link.send(News(held.number, held.told, held.steps[held.told :]))
                held.told = len(held.steps)
        plays = bool(self._crews) and not self._leaving
        room = self.version, self._room() if plays else 0, self._begun
        if room != self._room_told:
            self._room_told = room
            self._link.send(Room(*room))

    # ── ends ─────────────────────────────────────────────────────────────────────────────────

    def _on_end(self, episode: Episode, end: EpisodeEnd) -> None:
        self.add(episode, _ended(episode, end))
        held = self._by_local.pop(episode.id)
        held.episode = held.crew = None
        self._changed.set()

    def _keep(self, held: _Held) -> None:
        end = held.steps[-1]
        if isinstance(end, Ended) and end.trajectory is None and not end.failure:
            self._held.pop((held.controller, held.number), None)  # it was given up
            return
        held.spooled = True
        self._spool.add(Spooled(held.run, held.controller, held.number, held.steps))

    def _unspool(self, held: _Held) -> None:
        if held.spooled:
            self._spool.remove(held.controller, held.number)
            held.spooled = False

    def _forget(self, held: _Held) -> None:
        """Nobody wants it any more."""
        held.wanted = False
        self._unsent.pop(held, None)
        self._unspool(held)
        _give_up(held, "unwanted")
        self._changed.set()


def _give_up(held: _Held, reason: str) -> None:
    if held.episode is not None and held.crew is not None:
        held.crew.give_up(held.episode, reason)


class _Witness:
    """Hears what is said in episodes, for a player."""

    def __init__(self, player: Player) -> None:
        self._player = player

    def hears(self, event: str) -> bool:
        return True

    def observed(self, episode: Episode, observation: Observation) -> None:
        self._player.add(episode, Told.of(observation))

    def sampled(self, episode: Episode, step: Sampled) -> None:
        self._player.add(episode, Said(step))

    def begun_anew(self, episode: Episode) -> None:
        self._player.add(episode, Anew())


def _ended(episode: Episode, end: EpisodeEnd) -> Ended:
    trajectory, failure, words = None, "", ""
    if isinstance(end, Trajectory):
        trajectory = exact(end)
    elif isinstance(end, EpisodeFailure):
        failure, words = end.kind, sent(str(end))
    return Ended(
        trajectory=trajectory,
        failure=failure,
        words=words,
        prompt_tokens=episode.prompt_tokens,
        generated_tokens=episode.generated_tokens,
        turns=episode.turns,
        seconds=dict(episode.seconds),
        tool_uses=episode.tool_uses,
    )
