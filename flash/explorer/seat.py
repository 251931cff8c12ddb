"""An explorer's place in a fleet, and what it plays."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from flash.explorer.link import Link
from flash.explorer.messages import FromController, FromExplorer, Settled, State, Step
from flash.explorer.remote import RemoteEpisode
from flash.rollout.episode import Episode, EpisodeEnd
from flash.rollout.history import History


@dataclass(slots=True, eq=False, kw_only=True)
class Play:
    """An episode to be played here or at an explorer, and what was told of it from there.

    `number`: what the fleet calls it; those of training are called as in the run, or as the one
    that they continue, if its holder goes on with it.
    """

    number: int = 0
    episode: RemoteEpisode
    heldout: bool
    oldest_wanted: Callable[[], int]
    history: History
    room_here: Callable[[], int]
    play_here: Callable[[Episode], None] | None
    on_end: Callable[[Episode, EpisodeEnd], None]
    steps: list[Step] = field(default_factory=list)
    explorer: "Explorer | None" = None
    here: bool = False


@dataclass(slots=True, eq=False)
class Explorer:
    """One that is here, or is away and may come back."""

    name: str
    process: str
    where: str
    joined_at: float
    link: Link[FromExplorer] | None
    called: str  # by itself: another may have that name here
    evaluates: bool = False  # and does nothing else
    brings: Mapping[str, str] = field(default_factory=dict)  # task sets, with what they are
    tasks_only: bool = False  # that it brings
    version: int = -1
    room: int = 0
    begun: int = 0  # on this link
    leaving: bool = False
    compared: bool = False  # its workers with the trainer, since they were last due
    plays: dict[int, Play] = field(default_factory=dict)
    early: dict[int, list[Step]] = field(default_factory=dict)  # of what is due and did not begin
    state: State = State("starts", None, {})  # noqa: RUF009  (frozen)
    lease: asyncio.TimerHandle | None = None
    played: int = 0
    last_heard_at: float = 0.0

    @property
    def heard_at(self) -> float:
        return self.last_heard_at if self.link is None else self.link.heard_at

    def send(self, message: FromController, *, soon: bool = True) -> None:
        """If it is here; see Link.send."""
        if self.link is not None:
            self.link.send(message, soon=soon)

    def settle(self, episode: int) -> None:
        """What it told of that episode's end is safe, or is not wanted: it may forget it."""
        self.send(Settled([episode]), soon=False)
