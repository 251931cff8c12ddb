"""An explorer's side of its links: one after the other, as long as it lives."""

import asyncio
import contextlib
import itertools
import logging
import math
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from flash.errors import (
    FlashError,
    InferenceFailure,
    PublishFailure,
    first_error,
    one_line,
)
from flash.explorer.files import FetchFailure, GoneError
from flash.explorer.gate import NotTheController
from flash.explorer.link import Link, LinkLost, Wire
from flash.explorer.messages import (
    PROTOCOL,
    Begin,
    Files,
    FromController,
    GiveUp,
    Hello,
    Publish,
    Refused,
    RunOver,
    Score,
    Scored,
    SenderAnswer,
    Settled,
    Trouble,
    Welcome,
    sent,
)
from flash.explorer.player import Player
from flash.explorer.remote_senders import RemoteSenders
from flash.hub.hub import InferenceHub
from flash.hub.reports import PublishReport
from flash.system.machine import where
from flash.types import Scores, Weights

logger = logging.getLogger(__name__)

# What an explorer does not go by: with others of these it plays on.
_NOT_OF_PLAYERS = (
    *("name", "runs_dir", "steps", "alpha", "batch_size", "group_size", "stream", "publish_every"),
    *("eval_every", "transcripts", "trainer", "policy", "warm_start", "checkpoint", "log"),
    *("explorers",),
)
_NONE: Mapping[str, str] = {}
_MOST_NOT_PROBED = 50  # versions in a row, until that is told
_FIRST_DEADLINE_S = 30.0  # until the controller has told its own
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0


class RunIsOver(Exception):
    """The controller needs no explorers any more."""


class Connection:
    """Keeps a link to the controller, again and again, and passes on what it says.

    Args:
        name: what the explorer is called.
        connect: gives a wire to the controller; NotTheController if there is none now.
        have: gives the folder of weights on this machine; GoneError if there are newer ones.
        say: is told what the user should know.
        evaluates: it is for evaluations alone.
        brings: the task sets that it brings, by name, as `source_of_brought` tells them.
        tasks_only: it is for these alone.
        wait_s: how long a controller may be away, FlashError after that.
    """

    def __init__(
        self,
        name: str,
        player: Player,
        *,
        connect: Callable[[], AbstractAsyncContextManager[Wire]],
        have: Callable[[Files], Awaitable[Path]],
        say: Callable[[str], None],
        evaluates: bool = False,
        brings: Mapping[str, str] = _NONE,
        tasks_only: bool = False,
        wait_s: float = math.inf,
    ) -> None:
        self.name = name
        self.senders = RemoteSenders()
        self._evaluates = evaluates
        self._brings = dict(brings)
        self._tasks_only = tasks_only
        self._connect = connect
        self._have = have
        self._player = player
        self._say = say
        self._wait_s = wait_s
        self._away_since = asyncio.get_running_loop().time()
        self._process = uuid.uuid4().hex
        self._link: Link[FromController] | None = None
        self._welcome: Welcome | None = None
        self._played_for: Mapping[str, Any] | None = None  # with which configuration
        self._changed = asyncio.Event()
        self._weights: Publish | None = None
        self._news_of_weights = asyncio.Event()
        self._policy, self._given_by = -1, ""  # see Hello
        self._not_probed = 0  # versions, since the last one that was
        self._questions: dict[int, asyncio.Future[Scores | None]] = {}
        self._numbers = itertools.count()
        self._failure: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """While the block runs; what ends it for good comes out of it."""
        with first_error():
            async with asyncio.TaskGroup() as outer:
                keeping = outer.create_task(self._keep(), name="connection")
                try:
                    with first_error():
                        async with asyncio.TaskGroup() as inner:  # before the link ends
                            failing = inner.create_task(self._raise_failure(), name="failure")
                            yield
                            failing.cancel()
                finally:
                    keeping.cancel()

    def fail(self, error: Exception) -> None:
        """What no episode can be blamed for: tells the controller, and ends the block."""
        kind: Literal["inference", "publish", "other"] = "other"
        if isinstance(error, PublishFailure) and not isinstance(error, FetchFailure):
            kind = "publish"
        elif isinstance(error, InferenceFailure):
            kind = "inference"
        if self._link is not None:
            self._link.send(Trouble(kind, sent(one_line(error))))
        if not self._failure.done():
            self._failure.set_result(error)

    async def _raise_failure(self) -> None:
        raise await self._failure

    async def welcomed(self) -> Welcome:
        """The run, as soon as its controller has told of one that is not as the last one was."""
        await self.changes()
        assert self._welcome is not None
        self._played_for = _of_players(self._welcome.config)
        self._policy, self._given_by = self._welcome.version, self._welcome.controller
        return self._welcome

    async def changes(self) -> bool:
        """Waits until the run is not as the last one that was returned."""
        while self._welcome is None or self._played_for == _of_players(self._welcome.config):
            self._changed.clear()
            await self._changed.wait()
        return True

    async def model_by(self, have: Callable[[Files], Awaitable[Path]]) -> str:
        """What the run begins with: its folder on this machine, or its name."""
        while True:
            welcome = self._welcome
            assert welcome is not None
            if welcome.model_files is None:
                return welcome.model
            try:
                return str(await have(welcome.model_files))
            except GoneError:  # the controller that offered it was followed by another
                while self._welcome is welcome:
                    self._changed.clear()
                    await self._changed.wait()

    async def flush(self) -> None:
        if self._link is not None:
            await self._link.flush()

    # ── new weights ──────────────────────────────────────────────────────────────────────────

    @contextlib.asynccontextmanager
    async def publishing_to(
        self, hub: InferenceHub, *, by_files: bool = True
    ) -> AsyncIterator[None]:
        """Weights go to the hub's workers while the block runs: as files, which must be on this
        machine then, or from `senders`."""
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                publishing = tasks.create_task(self._publish_to(hub, by_files), name="publish")
                try:
                    yield
                finally:
                    publishing.cancel()

    async def _publish_to(self, hub: InferenceHub, by_files: bool) -> None:
        """The newest weights, whenever there are newer ones."""
        while True:
            newest = self._weights
            if newest is None or newest.version <= hub.version:
                self._news_of_weights.clear()
                await self._news_of_weights.wait()
                continue
            try:
                path = Path(newest.files.path)  # the controller's
                if by_files:
                    path = await self._have(newest.files)
                if self._weights is not newest:
                    continue
                self._policy = newest.version
                score = partial(self._score, newest.version) if newest.probe else None
                report = await hub.publish(Weights(version=newest.version, path=path, score=score))
                if newest.probe:
                    self._note_probe(report)
            except (FlashError, ValueError) as error:
                if not await self._are_gone(newest.files, error):
                    self.fail(error)
                    return
                if self._weights is newest:
                    self._news_of_weights.clear()
                    await self._news_of_weights.wait()
            self._player.tell_state()

    def _note_probe(self, report: PublishReport) -> None:
        """The trainer answers while it has nothing else to do, and waits a little now and then."""
        self._not_probed = self._not_probed + 1 if report.gap is None else 0
        if self._not_probed == _MOST_NOT_PROBED:
            logger.warning(
                "the workers here could not be compared with the trainer for %d versions: it was "
                "busy when they had its weights",
                _MOST_NOT_PROBED,
            )

    async def _are_gone(self, files: Files, error: Exception) -> bool:
        """Whether that is the error: nobody waits for who is slow to load what it shares."""
        try:
            if isinstance(error, PublishFailure) and not isinstance(error, FetchFailure):
                await self._have(files)
        except FlashError as failure:
            error = failure
        return isinstance(error, GoneError)

    async def _score(self, version: int, sequences: Sequence[Sequence[int]]) -> Scores | None:
        """What the trainer says; None if it has gone on, is busy, or can't be reached."""
        if self._link is None:
            return None
        number = next(self._numbers)
        asked: asyncio.Future[Scores | None]
        asked = self._questions[number] = asyncio.get_running_loop().create_future()
        self._link.send(Score(number, version, [list(each) for each in sequences]))
        try:
            return await asked
        finally:
            del self._questions[number]

    # ── the link ─────────────────────────────────────────────────────────────────────────────

    async def _keep(self) -> None:
        pause_s, said = _FIRST_PAUSE_S, False
        while True:
            try:
                async with (
                    self._connect() as wire,
                    Link[FromController](
                        wire, FromController, deadline_s=_FIRST_DEADLINE_S
                    ) as link,
                ):
                    pause_s, said = _FIRST_PAUSE_S, False
                    await self._serve(link)
            except NotTheController as refusal:
                if not refusal.again:
                    raise ValueError(str(refusal)) from refusal
                if not said:
                    self._say(f"waiting for the run's controller: {refusal}")
                said = True
                self._check_patience(refusal)
            except LinkLost as lost:
                self._say(f"the controller is away ({lost}): {self._player.running} episodes go on")
                self._check_patience(lost)
            await asyncio.sleep(pause_s)
            # What is held here is waited for as long as a lease.
            most_s = math.inf if self._welcome is None else self._welcome.lease_s / 4
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S, most_s)

    def _check_patience(self, away: Exception) -> None:
        if asyncio.get_running_loop().time() - self._away_since >= self._wait_s:
            raise FlashError(
                f"{self.name} leaves: the run's controller has been away for {self._wait_s:g} s "
                f"({away}), or the run is over; what {self.name} finished is handed in by the next "
                f"start of that name (--wait_s)"
            )

    async def _serve(self, link: Link[FromController]) -> None:
        link.send(self._hello())
        messages = link.messages()
        first = await anext(messages)
        if isinstance(first, Refused):
            raise (ValueError if first.final else LinkLost)(first.why)
        if isinstance(first, RunOver):
            self._hear(first)
        if not isinstance(first, Welcome):
            raise LinkLost("the first message of a controller must be Welcome")
        await self._enter(link, first)
        try:
            async for message in messages:
                self._hear(message)
        finally:
            self._link = self._weights = None  # the next one tells of what there is
            self._away_since = asyncio.get_running_loop().time()
            self.senders.detach()
            self._player.detach()
            for asked in self._questions.values():
                if not asked.done():
                    asked.set_result(None)

    async def _enter(self, link: Link[FromController], welcome: Welcome) -> None:
        # Half of the lease: who finds out that nothing passes can be back in time.
        link.use_deadline(welcome.lease_s / 2)
        of_this_run = self._welcome is not None and self._welcome.run == welcome.run
        self._link, self._welcome = link, welcome
        unknown = welcome.controller != self._given_by and self._policy > welcome.known
        if unknown or not of_this_run:
            self._played_for = None  # begins anew, with what this one has
        else:
            self._given_by = welcome.controller
        self._player.attach(link, welcome)
        self.senders.attach(link)
        self._changed.set()

    def _hello(self) -> Hello:
        return Hello(
            protocol=PROTOCOL,
            version=metadata.version("flash-rl"),
            name=self.name,
            process=self._process,
            holds=self._player.holds(),
            where=where(),
            policy=self._policy,
            given_by=self._given_by,
            evaluates=self._evaluates,
            brings=self._brings,
            tasks_only=self._tasks_only,
        )

    def _hear(self, message: FromController) -> None:
        match message:
            case Begin():
                self._player.begin(message)
            case GiveUp():
                self._player.give_up(message.episode, message.reason)
            case Settled():
                self._player.settled(message.episodes)
            case Publish():
                self._weights = message
                self._news_of_weights.set()
            case Scored():
                asked = self._questions.get(message.number)
                if asked is not None and not asked.done():
                    asked.set_result(_scores(message))
            case SenderAnswer():
                self.senders.hear(message)
            case RunOver():
                if not message.again:
                    raise RunIsOver(message.why)
                raise LinkLost(message.why)


def _scores(answer: Scored) -> Scores | None:
    if answer.logprobs is None:
        return None
    return Scores(logprobs=answer.logprobs, largest_logit=answer.largest_logit)


def _of_players(config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {name: value for name, value in config.items() if name not in _NOT_OF_PLAYERS}
