"""What plays episodes: a crew of supervised agents, each with one episode at a time."""

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, Self

from flash.errors import AgentFailure, EpisodeFailure, FlashError
from flash.rollout.episode import (
    Abort,
    Agent,
    AgentFactories,
    Cancelled,
    Episode,
    EpisodeEnd,
    Generator,
    Start,
    Stop,
    Witness,
)
from flash.rollout.history import History
from flash.types import Task

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 10.0


class Crew(Protocol):
    """Plays episodes, wherever that is: this is all that a loop knows of it.

    Between entering and leaving, each episode that began is reported once to `on_end`, from the
    event loop; leaving gives up those that run. `on_fatal` gets an error that no episode can be
    blamed for, `witness` hears what is said in episodes.
    """

    @property
    def crashes(self) -> int:
        """Agents that crashed and were replaced."""
        ...

    def report_to(
        self,
        *,
        on_end: Callable[[Episode, EpisodeEnd], None],
        on_fatal: Callable[[Exception], None],
        witness: Witness | None = None,
        oldest_wanted: Callable[[], int] = lambda: 0,
    ) -> None:
        """Before it is entered: who is told, and who knows which version's tokens are of use yet:
        what none but older weights could play is better not begun."""
        ...

    @property
    def waits_for(self) -> str:
        """What is to come before anything can be played, and may take its time; empty if nothing
        is."""
        ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(self, *exc_info: object) -> None: ...

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
        """An episode of that task, which is played from now on, if it can from where `history`
        ends: that of the episode that it `continues`. Raises if none can begin."""
        ...

    def give_up(self, episode: Episode, reason: str) -> None:
        """Ask for it to end; that is reported like any other end."""
        ...

    def episodes(self) -> list[Episode]:
        """Those that have not ended."""
        ...


class SessionHub(Generator, Protocol):
    """What a crew of agents needs of the InferenceHub."""

    def forget(self, session: str) -> None: ...


@dataclass(slots=True, eq=False)
class _Seat:
    agent: Agent
    task_set: str
    episode: Episode | None = None
    task: asyncio.Task[None] | None = field(default=None)


class AgentCrew:
    """The crew in this process: agents as coroutines, which ask the hub for tokens.

    Agents are made as they are needed, so the caller's bound on running episodes is the bound on
    agents. One that crashes fails its episode and is replaced.

    Args:
        make_agent: for all tasks, or by the name of a task set: then an agent plays that one only.
        together: the first responses of a group's episodes all come from one worker.
    """

    waits_for = ""

    def __init__(
        self, make_agent: AgentFactories, hub: SessionHub, *, together: bool = False
    ) -> None:
        self.crashes = 0
        self._make_agent = make_agent
        self._hub = hub
        self._together = together
        self._idle: dict[str, list[_Seat]] = defaultdict(list)  # by task set
        self._busy: dict[int, _Seat] = {}
        self._starting: set[Episode] = set()
        self._tasks = asyncio.TaskGroup()
        self._closing = False

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
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Every agent is asked to stop; after a grace they are cancelled."""
        self._closing = True
        seats = [*itertools.chain(*self._idle.values()), *self._busy.values()]
        for seat in seats:
            seat.agent.mailbox.put_nowait(Stop())
        tasks = [seat.task for seat in seats if seat.task is not None]
        try:
            if tasks:
                await asyncio.wait(tasks, timeout=_STOP_GRACE_S)
        finally:  # also if that wait is cancelled
            for task in tasks:
                task.cancel()
            await self._tasks.__aexit__(None, None, None)
            for seat in [*self._busy.values()]:
                self._release(seat, Cancelled())

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
        """Gives the episode to an idle agent, or to a new one; raises what making one raises."""
        episode = Episode(
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
        self.play(episode)
        return episode

    def play(self, episode: Episode) -> None:
        """As `begin`, an episode that is there."""
        assert not self._closing
        task_set = episode.task.task_set
        if idle := self._idle[task_set]:
            seat = idle.pop()
        else:
            seat = _Seat(self._new_agent(task_set), task_set)
            seat.task = self._tasks.create_task(self._supervise(seat), name="agent seat")
        seat.episode = episode
        self._busy[episode.id] = seat
        self._starting.add(episode)
        episode.on_request = self._starting.discard
        seat.agent.mailbox.put_nowait(Start(episode))

    def _new_agent(self, task_set: str) -> Agent:
        make = self._make_agent
        return make[task_set]() if isinstance(make, Mapping) else make()

    def give_up(self, episode: Episode, reason: str) -> None:
        if episode.cancel_reason is None:
            episode.cancel_reason = reason
            self._busy[episode.id].agent.mailbox.put_nowait(Abort(episode))

    @property
    def starting(self) -> int:
        """Episodes that have asked for no tokens yet, and soon will."""
        return len(self._starting)

    def episodes(self) -> list[Episode]:
        return [seat.episode for seat in self._busy.values() if seat.episode is not None]

    async def _supervise(self, seat: _Seat) -> None:
        """Runs the seat's agent; when it crashes, fails its episode and gives up the seat."""

        def report(episode: Episode, end: EpisodeEnd) -> None:
            if seat.episode is not episode:
                raise AgentFailure(f"reported episode {episode.id}, which it was not given")
            self._idle[seat.task_set].append(seat)
            self._release(seat, end)

        try:
            await seat.agent.run(report)
        except Exception as crash:  # the boundary between agents and engine
            cause = _root_cause(crash)
        else:
            if self._closing:
                return
            cause = AgentFailure("the agent returned, and nobody had asked it to stop")
        if isinstance(cause, FlashError) and not isinstance(cause, EpisodeFailure):
            # Nobody's fault here (no inference worker is left, say): the run can't go on.
            self._on_fatal(cause)
            return
        self.crashes += 1
        logger.warning(
            "an agent crashed%s and is replaced",
            f" in {seat.episode.describe()}" if seat.episode else " while idle",
            exc_info=cause,
        )
        if seat.episode is None:
            self._idle[seat.task_set].remove(seat)
        else:
            self._release(seat, _as_failure(cause))

    def _release(self, seat: _Seat, end: EpisodeEnd) -> None:
        episode = seat.episode
        assert episode is not None
        seat.episode = None
        del self._busy[episode.id]
        self._starting.discard(episode)
        self._hub.forget(episode.session)
        try:
            self._on_end(episode, end)
        except Exception as error:  # its caller here is an agent, which has no part in it
            self._on_fatal(error)


def _as_failure(cause: BaseException) -> EpisodeFailure:
    if isinstance(cause, EpisodeFailure):
        return cause
    failure = AgentFailure(f"the agent crashed: {cause!r}")
    failure.__cause__ = cause
    return failure


def _root_cause(error: BaseException) -> BaseException:
    """The first real error inside the groups that TaskGroups wrap around it."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
