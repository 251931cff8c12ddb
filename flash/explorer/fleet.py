"""The explorers of a run, as its controller sees them: who is here, and what each of them plays.

    FleetCrew.begin ─► waiting ─► the explorer with the most room  ─► Begin
                          ▲        whose weights are new enough     News: its steps, its end
                          │
                          └── a Begin that was lost with its link

    link lost ─► away ─► back in time: Hello says what it holds, and goes on
                   └───► not heard of for lease_s: what it held is cut off, and begins elsewhere

What an explorer holds is given to nobody else until then, and what it tells later is refused; so
no episode is played by two that both count. The loop behind knows none of this: see FleetCrew.
"""

import asyncio
import itertools
import logging
import uuid
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

from flash.errors import FlashError, PublishFailure
from flash.explorer.link import Link, LinkLost, Wire
from flash.explorer.messages import (
    PROTOCOL,
    Begin,
    Ended,
    Files,
    FromExplorer,
    GiveUp,
    Hello,
    Holding,
    Kept,
    Leaving,
    News,
    Publish,
    Refused,
    Returned,
    Room,
    RunOver,
    Said,
    Score,
    Scored,
    Settled,
    State,
    Step,
    Told,
    Trouble,
    Welcome,
)
from flash.explorer.remote import RemoteEpisode, cut_off
from flash.hub.reports import HubStats
from flash.rollout.committed import INTERRUPTED
from flash.rollout.episode import Cancelled, Episode, EpisodeEnd
from flash.rollout.history import History, Sampled

logger = logging.getLogger(__name__)

_HELLO_S = 10.0
_LOST_KEPT = 10_000  # numbers of episodes
_LOOK_AGAIN_S = 0.05  # at whether there is room here


@dataclass(slots=True, eq=False, kw_only=True)
class Play:
    """An episode to be played here or at an explorer, and what was told of it from there.

    `number`: what the fleet calls it; those of training are called as in the run."""

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
    version: int = -1
    room: int = 0
    begun: int = 0  # on this link
    leaving: bool = False
    plays: dict[int, Play] = field(default_factory=dict)
    state: State = State("starts", None, {})  # noqa: RUF009  (frozen)
    lease: asyncio.TimerHandle | None = None
    played: int = 0
    last_heard_at: float = 0.0

    @property
    def heard_at(self) -> float:
        return self.last_heard_at if self.link is None else self.link.heard_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What an explorer is told of the run."""

    id: str
    name: str
    config: dict[str, Any]
    where: str
    model: str
    model_files: Files | None
    version: int  # of the model


class Fleet:
    """Seats explorers that come, and gives them episodes. Enter it, and pass `welcome` each wire.

    Args:
        run: what explorers are told of it.
        lease_s: who is not heard of for so long has lost what it held.
        due: episodes that the run's last start gave to explorers, perhaps: one that a FleetCrew
            continues waits `lease_s` for who holds it.
        after_commit: calls once what was told of an episode can't be lost any more.
        version: that is published.
        publish: its weights, told to each that comes; None if they are what workers start with.
        score: the trainer's logprobs of tokens at a version, or None.
    """

    def __init__(
        self,
        run: Run,
        *,
        lease_s: float,
        due: Collection[int] = (),
        after_commit: Callable[[Callable[[], None]], None] = lambda then: then(),
        version: Callable[[], int] = lambda: 0,
        publish: Callable[[], Publish | None] = lambda: None,
        score: Callable[[Score], Awaitable[list[list[float]] | None]] | None = None,
    ) -> None:
        self.explorers: dict[str, Explorer] = {}
        self.on_fatal: Callable[[Exception], None] = lambda error: None
        self.counts: Counter[str] = Counter()  # of joins, returns, drains, losses, late answers
        self._run = run
        self._controller = uuid.uuid4().hex
        self._lease_s = lease_s
        self._due = set(due)
        self._after_commit = after_commit
        self._version = version
        self._publish = publish
        self._score = score
        self._waiting: deque[Play] = deque()
        self._claimable: dict[int, Play] = {}  # by the episode that they continue
        self._tasks = asyncio.TaskGroup()
        self._lost: dict[int, bool] = {}  # whose late answers are refused
        self._heldout = itertools.count(1)
        self._looks_again = False
        self._closed = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._tasks.__aexit__(None, None, None)

    async def close(self, why: str, *, again: bool) -> None:
        """Tells all explorers that they are not needed any more; or may be `again`, soon."""
        self._closed = True
        for explorer in self.explorers.values():
            if explorer.lease is not None:
                explorer.lease.cancel()
            if explorer.link is not None:
                explorer.link.send(RunOver(why, again))
                await explorer.link.flush()

    # ── what crews ask for ───────────────────────────────────────────────────────────────────

    def begin(self, play: Play) -> None:
        """To be played as soon as there is room for it."""
        play.number = -next(self._heldout) if play.heldout else play.episode.id
        continues = play.episode.continues
        if continues in self._due:
            self._due.discard(continues)
            self._claimable[continues] = play
            self._loop.call_later(self._lease_s, self._claim_is_over, continues)
        else:
            self._waiting.append(play)
            self.place()

    def give_up(self, play: Play) -> None:
        """Nothing is wanted of it any more; its end is reported."""
        explorer = play.explorer
        if explorer is not None and explorer.link is not None:
            explorer.link.send(GiveUp(play.number, play.episode.cancel_reason or ""))
            return
        self.drop(play)
        self._loop.call_soon(play.on_end, play.episode, Cancelled())

    def drop(self, play: Play) -> None:
        """Whatever comes of it is refused."""
        if play.explorer is not None:
            del play.explorer.plays[play.number]
            play.explorer = None
        elif play in self._waiting:
            self._waiting.remove(play)
        elif play.episode.continues is not None:
            self._claimable.pop(play.episode.continues, None)

    def place(self) -> None:
        """Gives what waits to who has room."""
        while self._waiting:
            play = self._waiting[0]
            explorer, here = self._best(play), play.room_here()
            if play.play_here is not None and here > (explorer.room if explorer else 0):
                self._waiting.popleft()
                play.here = True
                play.play_here(play.episode)
            elif explorer is not None:
                self._waiting.popleft()
                self._give(explorer, play)
            else:
                if play.play_here is not None and not self._looks_again:
                    self._looks_again = True
                    self._loop.call_later(_LOOK_AGAIN_S, self._look_again)
                return

    def _look_again(self) -> None:
        self._looks_again = False
        self.place()

    def _best(self, play: Play) -> Explorer | None:
        oldest = play.oldest_wanted()
        able = [
            explorer
            for explorer in self.explorers.values()
            if explorer.link is not None
            and not explorer.leaving
            and explorer.room > 0
            and explorer.version >= oldest
        ]
        return max(able, key=lambda explorer: explorer.room, default=None)

    def _give(self, explorer: Explorer, play: Play) -> None:
        assert explorer.link is not None
        explorer.room -= 1
        explorer.begun += 1
        explorer.plays[play.number] = play
        play.explorer = explorer
        episode = play.episode
        explorer.link.send(
            Begin(
                episode=play.number,
                task=episode.task,
                group=episode.group,
                attempt=episode.attempt,
                heldout=play.heldout,
                history=[Said(s) if isinstance(s, Sampled) else Told.of(s) for s in play.history],
            )
        )

    def _claim_is_over(self, continues: int) -> None:
        """Nobody came who holds it: it is played from where its logged history ends."""
        play = self._claimable.pop(continues, None)
        if play is not None:
            self._waiting.append(play)
            self.place()

    def publish(self, message: Publish) -> None:
        """Tells all that are here of new weights."""
        for explorer in self.explorers.values():
            if explorer.link is not None:
                explorer.link.send(message)

    # ── who comes and goes ───────────────────────────────────────────────────────────────────

    async def welcome(self, wire: Wire) -> None:
        """Has the explorer at the other end until its link is lost, or it leaves."""
        link: Link[FromExplorer] = Link(wire, FromExplorer, deadline_s=self._lease_s)
        async with link:
            explorer = None
            try:
                messages = link.messages()
                async with asyncio.timeout(_HELLO_S):
                    hello = await anext(messages)
                if why := self._refusal(hello):
                    link.send(Refused(why, final=True))
                    await link.flush()
                    return
                assert isinstance(hello, Hello)
                explorer = self._seat(hello, link)
                async for message in messages:
                    if explorer.link is not link:
                        return  # it has come by another one meanwhile
                    self._hear(explorer, message)
            except (LinkLost, TimeoutError, StopAsyncIteration) as lost:
                if explorer is not None and explorer.link is link:
                    logger.info("explorer %s is away: %s", explorer.name, lost)
            finally:
                if explorer is not None and explorer.link is link:
                    self._part(explorer)

    def _refusal(self, hello: FromExplorer) -> str:
        if not isinstance(hello, Hello):
            return "the first message must be Hello"
        if hello.protocol != PROTOCOL:
            return (
                f"this explorer speaks protocol {hello.protocol} (flash {hello.version}), and the "
                f"controller {PROTOCOL}: install the same version of flash on both sides"
            )
        if self._closed:
            return "the run is over"
        return ""

    def _seat(self, hello: Hello, link: Link[FromExplorer]) -> Explorer:
        """Its place, with what it goes on with; it is told what that is."""
        name, number = hello.name, 2
        while (other := self.explorers.get(name)) is not None and not (
            other.process == hello.process or other.link is None
        ):
            name, number = f"{hello.name}-{number}", number + 1
        explorer = self.explorers.get(name)
        if explorer is None:
            explorer = Explorer(name, hello.process, hello.where, self._clock(), link)
            self.explorers[name] = explorer
            self.counts["joins"] += 1
        else:
            if explorer.lease is not None:
                explorer.lease.cancel()
            self.counts["returns"] += 1
        explorer.lease = None
        explorer.link, explorer.process, explorer.where = link, hello.process, hello.where
        explorer.begun, explorer.room, explorer.leaving = 0, 0, False
        keeps, lost = self._reconcile(explorer, hello.holds)
        run = self._run
        link.send(
            Welcome(
                run=run.id,
                name=run.name,
                controller=self._controller,
                config=run.config,
                where=run.where,
                model=run.model,
                model_files=run.model_files,
                version=run.version,
                published=self._version(),
                lease_s=self._lease_s,
                keeps=keeps,
            )
        )
        for kept in keeps:
            reason = explorer.plays[kept.episode].episode.cancel_reason
            if reason is not None:
                link.send(GiveUp(kept.episode, reason))
        if (weights := self._publish()) is not None:
            link.send(weights)
        for play in lost:
            self._cut_off(play)
        return explorer

    def _reconcile(
        self, explorer: Explorer, holds: Collection[Holding]
    ) -> tuple[list[Kept], list[Play]]:
        """Of what it holds what it may go on with; and what it should hold and does not."""
        before, explorer.plays = explorer.plays, {}
        keeps: list[Kept] = []
        lost: list[Play] = []
        late = 0
        for held in (one for one in holds if one.run == self._run.id):
            if held.controller == self._controller:
                play = before.pop(held.episode, None)
            else:
                play = self._claimable.pop(held.episode, None)
            if play is None:
                late += held.ended and self._lost.pop(held.episode, False)
                continue
            first = len(play.steps)
            if held.steps < first:  # it knows less than it told
                lost.append(play)
                continue
            play.explorer = explorer
            explorer.plays[play.number] = play
            keeps.append(Kept(held, play.number, first))
        for play in before.values():
            if play.steps or play.episode.cancel_reason is not None:
                lost.append(play)
            else:  # its Begin was lost
                play.explorer = None
                self._waiting.appendleft(play)
        self.counts["late"] += late
        if late:
            logger.warning(
                "explorer %s came back with %d episodes that are not its own any more: refused",
                explorer.name, late,
            )  # fmt: skip
        return keeps, lost

    def _part(self, explorer: Explorer) -> None:
        """Its link is lost."""
        assert explorer.link is not None
        explorer.last_heard_at = explorer.link.heard_at
        explorer.link = None
        explorer.room = 0
        if explorer.leaving and not explorer.plays:
            del self.explorers[explorer.name]
            self.counts["drains"] += 1
            return
        for play in list(explorer.plays.values()):
            if play.episode.cancel_reason is not None:  # nobody waits for it
                self.give_up(play)
        if not self._closed:
            at = explorer.last_heard_at + self._lease_s
            explorer.lease = self._loop.call_at(at, self._lose, explorer)

    def _lose(self, explorer: Explorer) -> None:
        """It was not heard of for too long."""
        del self.explorers[explorer.name]
        self.counts["losses"] += 1
        self.counts["cut_off"] += len(explorer.plays)
        logger.warning(
            "explorer %s (%s) was not heard of for %g s (explorers.lease_s): its %d episodes begin "
            "elsewhere", explorer.name, explorer.where, self._lease_s, len(explorer.plays),
        )  # fmt: skip
        plays, explorer.plays = explorer.plays, {}
        for play in plays.values():
            self._lost[play.number] = True
            self._cut_off(play)
        while len(self._lost) > _LOST_KEPT:
            del self._lost[next(iter(self._lost))]

    def _cut_off(self, play: Play) -> None:
        play.explorer = None
        end = Cancelled()
        if play.episode.cancel_reason is None:
            play.episode.cancel_reason = INTERRUPTED
            end = cut_off(play.steps, play.history)
        play.on_end(play.episode, end)

    # ── what they say ────────────────────────────────────────────────────────────────────────

    def _hear(self, explorer: Explorer, message: FromExplorer) -> None:
        match message:
            case News():
                self._hear_news(explorer, message)
            case Room():
                explorer.version = message.version
                explorer.room = message.room - (explorer.begun - message.begun)
                self.place()
            case State():
                explorer.state = message
                for episode, stage in message.stages.items():
                    if (play := explorer.plays.get(episode)) is not None:
                        play.episode.is_at(stage)
            case Leaving():
                explorer.leaving = True
            case Returned():
                for episode in message.episodes:
                    if (play := explorer.plays.pop(episode, None)) is not None:
                        self.counts["handed_back"] += 1
                        self._cut_off(play)
                    self._settle(explorer, episode)
            case Score():
                self._tasks.create_task(self._answer(explorer, message), name="score")
            case Trouble():
                self._hear_trouble(explorer, message)

    def _hear_news(self, explorer: Explorer, news: News) -> None:
        play = explorer.plays.get(news.episode)
        if play is None:  # it was given up
            if isinstance(news.steps[-1], Ended):
                self._settle(explorer, news.episode)
            return
        for step in news.steps[max(0, len(play.steps) - news.first) :]:
            play.steps.append(step)
            end = play.episode.follow(step)
            if end is not None:
                del explorer.plays[news.episode]
                if isinstance(end, Cancelled) and play.episode.cancel_reason is None:
                    self._cut_off(play)  # nobody has asked for that: its crew is at its end
                else:
                    explorer.played += 1
                    play.explorer = None
                    play.on_end(play.episode, end)
                self._after_commit(partial(self._settle, explorer, news.episode))
                return

    def _settle(self, explorer: Explorer, episode: int) -> None:
        if explorer.link is not None:
            explorer.link.send(Settled([episode]))

    async def _answer(self, explorer: Explorer, question: Score) -> None:
        logprobs = None if self._score is None else await self._score(question)
        if explorer.link is not None:
            explorer.link.send(Scored(question.number, logprobs))

    def _hear_trouble(self, explorer: Explorer, trouble: Trouble) -> None:
        error: FlashError
        if trouble.kind == "publish":
            error = PublishFailure(f"explorer {explorer.name}: {trouble.words}")
            self.on_fatal(error)
        else:
            logger.warning("explorer %s can't go on: %s", explorer.name, trouble.words)

    # ── how it stands ────────────────────────────────────────────────────────────────────────

    @property
    def waits_for(self) -> str:
        """What must come before explorers can play anything; empty if one can."""
        if not self.explorers:
            return "an explorer: flash explore starts one"
        if all(explorer.version < 0 for explorer in self.explorers.values()):
            told = (f"{e.name} ({e.state.doing or 'away'})" for e in self.explorers.values())
            return f"explorers: {', '.join(told)}"
        return ""

    @property
    def waiting(self) -> int:
        """Episodes that no explorer has yet."""
        return len(self._waiting) + len(self._claimable)

    def stats(self) -> dict[str, HubStats]:
        """Of each explorer that told them."""
        return {
            name: explorer.state.stats
            for name, explorer in self.explorers.items()
            if explorer.state.stats is not None
        }

    def where_is(self, episode: int) -> str:
        """The explorer that plays it; empty if none does."""
        for name, explorer in self.explorers.items():
            if episode in explorer.plays:
                return name
        return ""
