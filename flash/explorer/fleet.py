"""The explorers of a run, as its controller sees them: who is here, and what each of them plays.

    FleetCrew.begin ─► waiting ─► the explorer with the most room  ─► Begin
                          ▲        whose weights are new enough     News: its steps, its end
                          │
                          └── a Begin that was lost with its link

    link lost ─► away ─► back in time: Hello says what it holds, and goes on
                   └───► not heard of for lease_s: what it held is cut off, and begins elsewhere

    a new start of the controller: what an explorer holds of the last one and is due is kept, and
    joined to the episode that continues it, once that begins

What an explorer holds is given to nobody else until then, and what it tells later is refused; so
no episode is played by two that both count. The loop behind knows none of this: see FleetCrew.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import Counter
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from flash.errors import FlashError, PublishFailure
from flash.explorer.brought import Brought
from flash.explorer.claims import Claims
from flash.explorer.link import Link, LinkLost, Wire
from flash.explorer.messages import (
    PROTOCOL,
    Ended,
    Files,
    FromExplorer,
    GiveUp,
    Hello,
    Holding,
    Kept,
    Leaving,
    News,
    OfSender,
    Publish,
    Refused,
    Returned,
    Room,
    RunOver,
    Score,
    State,
    Step,
    Trouble,
    Welcome,
    controller_of,
    start_of,
)
from flash.explorer.placing import Placing
from flash.explorer.remote import cut_off
from flash.explorer.seat import Explorer, Play
from flash.explorer.senders import Senders, Sending
from flash.explorer.updates import Updates
from flash.hub.reports import HubStats
from flash.rollout.committed import INTERRUPTED
from flash.rollout.episode import Cancelled
from flash.types import Scores

logger = logging.getLogger(__name__)

_HELLO_S = 10.0
_LOST_KEPT = 10_000  # numbers of episodes
_GOODBYE_S = 5.0


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

    @property
    def first_weights(self) -> Publish | None:
        """Those of the model, if it is a folder of the controller's."""
        if self.model_files is None:
            return None
        return Publish(self.version, self.model_files, probe=False)


class Fleet:
    """Seats explorers that come, and gives them episodes. Enter it, and pass `welcome` each wire.

    Args:
        run: what explorers are told of it.
        lease_s: who is not heard of for so long has lost what it held.
        due: episodes that explorers may hold, and which start of the run gave each. One that a
            FleetCrew continues waits for who holds it, and who holds it plays on: until `lease_s`
            after the first episode began.
        start: the number of this start of the run's controller.
        known: the newest version that is still what the start of that number called so.
        after_commit: calls once what was told of an episode can't be lost any more.
        version: that is published.
        publish: its weights, told to each that comes; None if they are what workers start with.
        score: the trainer's logprobs of tokens at a version, or None.
        apart: evaluations are played by explorers that do nothing else; their weights stay as they
            are while one is played.
        brought: the task sets that are for who brings them.
        sending: what sends weights to explorers' workers; None where they read files.
    """

    def __init__(
        self,
        run: Run,
        *,
        lease_s: float,
        due: Mapping[int, int] | None = None,
        start: int = 0,
        known: Callable[[int], int] = lambda start: 0,
        after_commit: Callable[[Callable[[], None]], None] = lambda then: then(),
        version: Callable[[], int] = lambda: 0,
        publish: Callable[[], Publish | None] = lambda: None,
        score: Callable[[Score], Awaitable[Scores | None]] | None = None,
        apart: bool = False,
        brought: Brought | None = None,
        sending: Sending | None = None,
    ) -> None:
        self.brought = brought or Brought()
        self.explorers: dict[str, Explorer] = {}
        self.on_fatal: list[Callable[[Exception], None]] = []
        self.counts: Counter[str] = Counter()  # of joins, returns, drains, losses, late answers
        self._run = run
        self._controller = controller_of(start)
        self._lease_s = lease_s
        self._known = known
        self._after_commit = after_commit
        self._version = version
        self._sending = sending
        self.placing = Placing(
            self.explorers, brought=self.brought, apart=apart, on_fatal=self._fail
        )
        self.updates = Updates(
            self.explorers,
            first=run.first_weights,
            published=publish,
            score=score,
            exam_waits=lambda: apart and self.placing.has_heldout,
        )
        self._claims = Claims(
            self.explorers,
            due=due or {},
            known=known,
            wait_s=lease_s,
            on_claim=self._go_on,
            on_unclaimed=self._place,
        )
        self._uncommitted: dict[int, Explorer] = {}  # who has not been told that an end is safe
        self._tasks = asyncio.TaskGroup()
        self._lost: dict[int, bool] = {}  # whose late answers are refused
        self._heldout = itertools.count(1)
        self._continuing: dict[int, int] = {}  # the numbers of episodes that have another's
        self._over: RunOver | None = None
        self._parted = asyncio.Event()
        self._counted: dict[str, HubStats] = {}  # by process, which counts on when it is back

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._tasks.__aexit__(None, None, None)

    async def close(self, why: str, *, again: bool) -> None:
        """Tells all explorers that they are not needed any more; or may be `again`, soon.

        Waits until those that are here have heard of it: what was only sent is lost with this
        process if the network loses it once.
        """
        self._over = RunOver(why, again)
        self._claims.close()
        for explorer in self.explorers.values():
            if explorer.lease is not None:
                explorer.lease.cancel()
            if explorer.link is not None:
                explorer.link.send(self._over)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                while any(explorer.link is not None for explorer in self.explorers.values()):
                    self._parted.clear()
                    await self._parted.wait()

    # ── what crews ask for ───────────────────────────────────────────────────────────────────

    def begin(self, play: Play) -> None:
        """To be played as soon as there is room for it."""
        play.number = -next(self._heldout) if play.heldout else play.episode.id
        if play.heldout and not self.placing.has_heldout:  # an evaluation begins, perhaps
            self.updates.catch_up()
        if play.heldout or not self._claims.begin(play):
            self._place(play)

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
        elif not self._claims.drop(play):
            self.placing.drop(play)

    def _place(self, play: Play) -> None:
        self.placing.wait(play)
        self.placing.place()

    def _go_on(self, explorer: Explorer, play: Play, steps: Sequence[Step]) -> None:
        """An explorer has what it was given by the last start of the run."""
        self.counts["claims"] += 1
        self._continuing[play.episode.id] = play.number
        self._follow(explorer, play, steps)

    def _fail(self, error: Exception) -> None:
        for on_fatal in list(self.on_fatal):
            on_fatal(error)

    # ── who comes and goes ───────────────────────────────────────────────────────────────────

    async def welcome(self, wire: Wire) -> None:
        """Has the explorer at the other end until its link is lost, or it leaves."""
        # Half of the lease: who finds out that nothing passes can be back in time.
        link: Link[FromExplorer] = Link(wire, FromExplorer, deadline_s=self._lease_s / 2)
        async with link:
            try:
                messages = link.messages()
                async with asyncio.timeout(_HELLO_S):
                    hello = await anext(messages)
            except (LinkLost, TimeoutError, StopAsyncIteration):
                return
            if why := self._refusal(hello):
                link.send(Refused(why, final=True))
                await link.flush()
                return
            if self._over is not None:
                link.send(self._over)
                await link.flush()
                return
            assert isinstance(hello, Hello)
            explorer = self._seat(hello, link)
            async with Senders(
                self._sending, link, explorer=explorer.name, address=wire.local_address
            ) as senders:
                await self._serve(explorer, link, messages, senders)

    async def _serve(
        self,
        explorer: Explorer,
        link: Link[FromExplorer],
        messages: AsyncIterator[FromExplorer],
        senders: Senders,
    ) -> None:
        """Until that link is lost, or it has come by another one."""
        try:
            async for message in messages:
                if explorer.link is not link:
                    return
                if isinstance(message, OfSender):
                    senders.hear(message)
                else:
                    self._hear(explorer, message)
        except LinkLost as lost:
            if explorer.link is link:
                logger.info("explorer %s is away: %s", explorer.name, lost)
        finally:
            if explorer.link is link:
                self._part(explorer)

    def _refusal(self, hello: FromExplorer) -> str:
        if not isinstance(hello, Hello):
            return "the first message must be Hello"
        if hello.protocol != PROTOCOL:
            return (
                f"this explorer speaks protocol {hello.protocol} (flash {hello.version}), and the "
                f"controller {PROTOCOL}: install the same version of flash on both sides"
            )
        others = (
            (explorer.name, explorer.brings)
            for explorer in self.explorers.values()
            if explorer.link is not None and explorer.process != hello.process
        )
        return self.brought.refusal(hello.brings, others)

    def _seat(self, hello: Hello, link: Link[FromExplorer]) -> Explorer:
        """Its place, with what it goes on with; it is told what that is."""
        explorer = self._seat_of(hello)
        if explorer is None:
            name, number = hello.name, 2
            while name in self.explorers:
                name, number = f"{hello.name}-{number}", number + 1
            explorer = Explorer(name, hello.process, hello.where, self._clock(), link, hello.name)
            self.explorers[name] = explorer
            self.counts["joins"] += 1
        else:
            if explorer.lease is not None:
                explorer.lease.cancel()
            self.counts["returns"] += 1
        explorer.lease = None
        explorer.link, explorer.process, explorer.where = link, hello.process, hello.where
        explorer.brings, explorer.tasks_only = hello.brings, hello.tasks_only
        explorer.evaluates = hello.evaluates
        explorer.begun, explorer.room, explorer.leaving = 0, 0, False
        keeps, lost = self._reconcile(explorer, hello)
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
                known=self._known(start_of(hello.given_by)),
            )
        )
        for play in explorer.plays.values():
            if (reason := play.episode.cancel_reason) is not None:
                link.send(GiveUp(play.number, reason))
        if (weights := self.updates.newest) is not None:
            link.send(weights)
        for play in lost:
            self._cut_off(play)
        self.placing.place()
        return explorer

    def _put_back(self, plays: Iterable[Play]) -> list[Play]:
        """Those that nobody plays wait again, where their Begin was lost; gives the others."""
        others = []
        for play in plays:
            if play.steps or play.episode.cancel_reason is not None:
                others.append(play)
            else:
                play.explorer = None
                self.placing.wait(play, first=True)
        return others

    def _seat_of(self, hello: Hello) -> Explorer | None:
        """Where it was; or one of its name was that is away, and will not come back."""
        for explorer in self.explorers.values():
            if explorer.process == hello.process:
                return explorer
        namesake = self.explorers.get(hello.name)
        return namesake if namesake is not None and namesake.link is None else None

    def _reconcile(self, explorer: Explorer, hello: Hello) -> tuple[list[Kept], list[Play]]:
        """Of what it holds what it may go on with; and what it should hold and does not."""
        before, explorer.plays = explorer.plays, {}
        before_early, explorer.early = explorer.early, {}
        keeps: list[Kept] = []
        lost: list[Play] = []
        late = 0
        known = self._known(start_of(hello.given_by))
        plays_on = hello.given_by == self._controller or hello.policy <= known
        for held in (one for one in hello.holds if one.run == self._run.id):
            number = held.episode
            if held.controller != self._controller:
                if self._claims.may_go_on(held) and (plays_on or held.ended):
                    self._claims.keep(explorer, held)
                    keeps.append(Kept(held, 0))
                    self._loop.call_soon(self._claims.claim, number)
                continue
            if number in before_early:
                explorer.early[number] = before_early[number]
                keeps.append(Kept(held, len(before_early[number])))
                self._loop.call_soon(self._claims.claim, number)
                continue
            if number in self._uncommitted:
                self._uncommitted[number] = explorer
                keeps.append(Kept(held, held.steps))
                continue
            play = before.pop(number, None) or self._left_by_namesake(explorer, held)
            if play is None:
                late += held.ended and self._lost.pop(number, False)
                continue
            first = len(play.steps)
            if held.steps < first:  # it knows less than it told
                lost.append(play)
                continue
            play.explorer = explorer
            explorer.plays[play.number] = play
            keeps.append(Kept(held, first))
        lost += self._put_back(before.values())
        self.counts["late"] += late
        if late:
            logger.warning(
                "explorer %s came back with %d episodes that are not its own any more: refused",
                explorer.name, late,
            )  # fmt: skip
        return keeps, lost

    def _left_by_namesake(self, explorer: Explorer, held: Holding) -> Play | None:
        """What was finished by an earlier start of that explorer, whose link seems to be alive."""
        if not held.ended:
            return None
        for other in self.explorers.values():
            if other is not explorer and other.called == explorer.called:
                play = other.plays.get(held.episode)
                if play is not None and len(play.steps) <= held.steps:
                    return other.plays.pop(held.episode)
        return None

    def _part(self, explorer: Explorer) -> None:
        """Its link is lost."""
        assert explorer.link is not None
        explorer.last_heard_at = explorer.link.heard_at
        explorer.link = None
        explorer.room = 0
        self._parted.set()
        self.updates.is_not_due(explorer)
        if explorer.leaving and not (explorer.plays or explorer.early):
            del self.explorers[explorer.name]
            self.counts["drains"] += 1
            return
        for play in list(explorer.plays.values()):
            if play.episode.cancel_reason is not None:  # nobody waits for it
                self.give_up(play)
        if self._over is None:
            # A controller that was suspended itself finds out late, and leaves time to come back.
            heard_at = max(explorer.last_heard_at, self._clock() - self._lease_s / 2)
            at = heard_at + self._lease_s
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
                if explorer.room > 0:
                    self.placing.place()
            case State():
                explorer.state = message
                if message.stats is not None:
                    self._counted[explorer.process] = replace(message.stats, workers=())
                for episode, stage in message.stages.items():
                    if (play := explorer.plays.get(episode)) is not None:
                        play.episode.is_at(stage)
            case Leaving():
                self._hear_of_leave(explorer, message)
            case Returned():
                self._hear_of_return(explorer, message)
            case Score():
                self._tasks.create_task(self.updates.answer(explorer, message), name="score")
            case Trouble():
                self._hear_trouble(explorer, message)

    def _hear_of_leave(self, explorer: Explorer, leaving: Leaving) -> None:
        explorer.leaving = True
        if leaving.done:
            plays, explorer.plays, explorer.early = explorer.plays, {}, {}
            for play in self._put_back(plays.values()):
                self._cut_off(play)
            self.placing.place()

    def _hear_of_return(self, explorer: Explorer, returned: Returned) -> None:
        for episode in returned.episodes:
            if (play := explorer.plays.pop(episode, None)) is not None:
                self.counts["handed_back"] += 1
                self._cut_off(play)
            else:
                explorer.early.pop(episode, None)
            explorer.settle(episode)

    def _hear_news(self, explorer: Explorer, news: News) -> None:
        play = explorer.plays.get(news.episode)
        if play is not None:
            self._follow(explorer, play, news.steps[max(0, len(play.steps) - news.first) :])
        elif (early := explorer.early.get(news.episode)) is not None:
            early += news.steps[max(0, len(early) - news.first) :]
            self._claims.claim(news.episode)
        elif news.steps and isinstance(news.steps[-1], Ended):  # it was given up
            explorer.settle(news.episode)

    def _follow(self, explorer: Explorer, play: Play, steps: Sequence[Step]) -> None:
        for step in steps:
            play.steps.append(step)
            end = play.episode.follow(step)
            if end is None:
                continue
            del explorer.plays[play.number]
            self._uncommitted[play.number] = explorer
            if isinstance(end, Cancelled) and play.episode.cancel_reason is None:
                self._cut_off(play)  # nobody has asked for that: its crew is at its end
            else:
                explorer.played += 1
                play.explorer = None
                play.on_end(play.episode, end)
            if explorer.evaluates and not self.updates.is_examined(explorer):
                self.updates.catch_up()
            self._after_commit(partial(self._committed, play.number))
            return

    def _committed(self, number: int) -> None:
        if (explorer := self._uncommitted.pop(number, None)) is not None:
            explorer.settle(number)

    def _hear_trouble(self, explorer: Explorer, trouble: Trouble) -> None:
        error: FlashError
        if trouble.kind == "publish":
            error = PublishFailure(f"explorer {explorer.name}: {trouble.words}")
            self._fail(error)
        else:
            logger.warning("explorer %s can't go on: %s", explorer.name, trouble.words)

    # ── how it stands ────────────────────────────────────────────────────────────────────────

    @property
    def waiting(self) -> int:
        """Episodes that no explorer has yet."""
        return len(self.placing) + len(self._claims)

    def stats(self) -> dict[str, HubStats]:
        """Of each explorer that told them."""
        return {
            name: explorer.state.stats
            for name, explorer in self.explorers.items()
            if explorer.state.stats is not None
        }

    def counted(self) -> Collection[HubStats]:
        """What each of them told last, those too that are not here any more; without workers."""
        return self._counted.values()

    def where_is(self, episode: int) -> str:
        """The explorer that plays this episode of training; empty if none does."""
        number = self._continuing.get(episode, episode)
        return next((name for name, one in self.explorers.items() if number in one.plays), "")
