"""One episode's life, and the messages between the loop and the agent that lives it."""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flash.errors import EpisodeFailure, HistoryDiverged
from flash.rollout.history import History, Replay, Sampled, prompt_sum
from flash.types import (
    Completion,
    GenerateRequest,
    Observation,
    SamplingParams,
    Task,
    ToolUse,
    Trajectory,
)

logger = logging.getLogger(__name__)


class Generator(Protocol):
    """What an episode needs of the hub."""

    async def generate(
        self,
        request: GenerateRequest,
        on_start: Callable[[int], None] | None = None,
        on_sampled: Callable[[int], None] | None = None,
    ) -> Completion: ...


class Witness(Protocol):
    """Hears what is said in an episode, as it is said."""

    def hears(self, event: str) -> bool:
        """Whether it wants to know of that: what nobody does is not prepared."""
        ...

    def observed(self, episode: "Episode", observation: Observation) -> None: ...

    def sampled(self, episode: "Episode", step: Sampled) -> None: ...

    def begun_anew(self, episode: "Episode") -> None: ...


class Stage:
    """What an episode is doing, while the block of `Episode.stage` runs."""

    __slots__ = ("_episode", "name")

    def __init__(self, name: str, episode: "Episode | None" = None) -> None:
        self.name = name
        self._episode = episode

    def __enter__(self) -> None:
        assert self._episode is not None
        self._episode.begin_stage(self)

    def __exit__(self, *exc_info: object) -> None:
        assert self._episode is not None
        self._episode.end_stage(self)


# Their time is told otherwise: nothing happens yet, or the ledger knows how long.
_NOT_TIMED = {"start", "ready"}


class Episode:
    """One agent's life in one environment: its task, its stage, its clocks and its tokens.

    The agent calls `generate` and marks its other stages with `with episode.stage("env")`; the
    loop reads the rest. Times are seconds of the event loop's clock. The first responses of the
    episodes of a group that are `together` come from one worker. `history` is used by an agent
    that calls `replay_history`, and by no other.
    """

    def __init__(
        self,
        episode_id: int,
        task: Task,
        *,
        hub: Generator,
        group: int = -1,
        attempt: int = 1,
        together: bool = False,
        history: History = (),
        continues: int | None = None,
        witness: Witness | None = None,
    ) -> None:
        self.id = episode_id
        self.session = f"episode-{episode_id}"  # its turns have it in common for the hub
        self.task = task
        self.group = group
        self.attempt = attempt
        self.continues = continues  # the episode that was cut off, and in whose place it begins
        self.clock = asyncio.get_running_loop().time
        self.admitted_at = self.clock()
        self.ended_at: float | None = None
        self.stage_since = self.admitted_at
        self.seconds: dict[str, float] = {}
        self._stages = [Stage("start")]
        self._reset_counts()
        self.trajectory: Trajectory | None = None
        self.tokens_of: Mapping[int, int] = {}  # how many each version sampled, of all at its end
        self.ready = False  # it has one, which no crash can lose
        self.cancel_reason: str | None = None
        self.on_request: Callable[[Episode], None] = lambda _: None  # it asks the hub for tokens
        self._hub = hub
        self._history = history
        self._replay = Replay()
        self._witness = witness
        self._pin = f"group-{group}" if together else ""

    def _reset_counts(self) -> None:
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.turns = 0
        self.tool_uses: dict[str, ToolUse] = {}  # by tool
        self.cut_responses = 0  # that ended at a limit of tokens
        self.over: bool | None = None  # whether its environment ended it; None: it has none of ours
        self.oldest: float = math.inf  # as `oldest_version`, where many are compared
        self.newest_version: int | None = None

    async def generate(self, token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        """One sampled response after `token_ids`; counted, timed and stamped."""
        request = GenerateRequest(
            token_ids=token_ids,
            sampling=sampling,
            session=self.session,
            pin="" if self.turns else self._pin,
        )
        known = 0

        def count(sampled: int) -> None:  # also of a response that will never be whole
            nonlocal known
            self.generated_tokens += sampled - known
            known = sampled

        with self.stage("generate"):
            completion = self._replay.sampled(request)
            if completion is None:
                self.on_request(self)
                completion = await self._hub.generate(
                    request, on_start=self._note_version, on_sampled=count
                )
            else:
                await asyncio.sleep(0)  # an environment of this process may never give way
        self.turns += 1
        self.cut_responses += completion.finish_reason == "length"
        self.prompt_tokens += len(token_ids)
        count(len(completion.token_ids))
        if completion.versions:
            self._note_versions(completion)
        if self._witness is not None and self._witness.hears("sampled"):
            step = Sampled(prompt_sum=prompt_sum(token_ids), completion=completion)
            self._witness.sampled(self, step)
        return completion

    def observe(self, observation: Observation) -> None:
        """What the environment answered to the reset, or to an action."""
        self._replay.observed(observation)
        self.over = observation.terminated
        if self._witness is not None:
            self._witness.observed(self, observation)

    def replay_history(self) -> None:
        """Go on from where the history ends: what is in it is sampled by nobody again.

        For an agent that always does the same in an environment that does so too, before it
        observes or generates anything. From now on `generate` answers from the history while it
        lasts, and `observe` compares; either raises HistoryDiverged where something is different.
        Then `begin_anew`, and play from the beginning.
        """
        self._replay = Replay(self._history)

    def begin_anew(self, why: HistoryDiverged) -> None:
        """Forgets the history and all that was counted; the time that was spent stays spent."""
        logger.warning(
            "episode %d (%s, group %d, attempt %d) starts over, after %d turns of its "
            "history: %s",
            self.id, self.task, self.group, self.attempt, self.turns, why,
        )  # fmt: skip
        self._history, self._replay = (), Replay()
        self._reset_counts()
        if self._witness is not None:
            self._witness.begun_anew(self)

    def _note_version(self, version: int) -> None:
        """A worker at `version` began to sample for us: no token of ours can be older."""
        self.oldest = min(self.oldest, version)

    def _note_versions(self, completion: Completion) -> None:
        """Those of tokens that it has."""
        oldest = newest = completion.only_version
        if oldest is None or newest is None:
            oldest, newest = min(completion.versions), max(completion.versions)
        self._note_version(oldest)
        if self.newest_version is None or newest > self.newest_version:
            self.newest_version = newest

    @property
    def oldest_version(self) -> int | None:
        """Of a token that it has; None if it has none."""
        return None if self.oldest == math.inf else int(self.oldest)

    @property
    def stage_name(self) -> str:
        """The stage that began last and is not over."""
        return self._stages[-1].name

    def stage(self, name: str) -> Stage:
        """Names what the episode is doing, and adds the time it takes to `seconds[name]`.

        Time counts for one stage only: the one that began last, of those within each other and
        of those side by side.
        """
        return Stage(name, self)

    def begin_stage(self, stage: Stage) -> None:
        """It is in that one now, and goes back to the one before at its end."""
        self._leave(self._stages[-1].name)
        self._stages.append(stage)

    def end_stage(self, stage: Stage) -> None:
        """That one is over, whether it began last or not."""
        if self._stages[-1] is stage:
            self._leave(stage.name)
            self._stages.pop()
        else:
            self._stages.remove(stage)

    def _leave(self, stage: str) -> None:
        """Another one is timed from now on."""
        now = self.clock()
        if stage not in _NOT_TIMED:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.stage_since
        self.stage_since = now

    def finish(self, trajectory: Trajectory) -> None:
        """The episode came to its end; its true token versions replace what was estimated."""
        self.trajectory = trajectory
        self.tokens_of = _tokens_of(trajectory)
        if self.tokens_of:
            self.oldest, self.newest_version = min(self.tokens_of), max(self.tokens_of)
        self.begin_stage(Stage("ready"))

    def end(self) -> float:
        """Nothing more becomes of it; returns when that was. What it waited ready is `wait`."""
        self.ended_at = self.clock()
        if self.trajectory is not None:
            self.seconds["wait"] = self.ended_at - self.stage_since
        return self.ended_at

    def describe(self) -> str:
        """Who it is, what it does and since when: for logs and for errors about stalls."""
        since = self.clock() - self.stage_since
        return (
            f"episode {self.id} ({self.task}, group {self.group}, attempt "
            f"{self.attempt}) in stage '{self.stage_name}' for {since:.1f} s"
        )


def _tokens_of(trajectory: Trajectory) -> Counter[int]:
    counts: Counter[int] = Counter()
    for sequence in trajectory.sequences:
        versions = sequence.sampled_versions()
        if versions.size:
            first = int(versions[0])
            if np.count_nonzero(versions == first) == versions.size:  # as nearly always
                counts[first] += versions.size
                continue
            first = int(versions.min())
            sampled = enumerate(np.bincount(versions - first).tolist(), start=first)
            counts.update({version: count for version, count in sampled if count})
    return counts


# ── the actor's messages ─────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Start:
    """Live this episode; its end is reported once, whatever happens."""

    episode: Episode


@dataclass(frozen=True, slots=True)
class Abort:
    """Give up this episode, if it still runs."""

    episode: Episode


@dataclass(frozen=True, slots=True)
class Stop:
    """Give up the present episode, if any, and return from `run`."""


Message = Start | Abort | Stop


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The episode was given up on request, or was cut off; `history` is what was said in it, from
    where another can go on."""

    history: History = ()


EpisodeEnd = Trajectory | EpisodeFailure | Cancelled


class Agent(Protocol):
    """An actor: one coroutine, one mailbox, one episode at a time.

    `run` reads the mailbox until Stop. It reports each started episode exactly once: with its
    trajectory, with an EpisodeFailure, or as Cancelled. Any other error may leave `run`: then the
    agent has crashed, its episode fails, and a new agent takes its seat. The mailbox must have
    room for one message of each kind.
    """

    mailbox: asyncio.Queue[Message]

    async def run(self, report: Callable[[Episode, EpisodeEnd], None]) -> None: ...


AgentFactory = Callable[[], Agent]
AgentFactories = AgentFactory | Mapping[str, AgentFactory]
"""For all tasks, or for those of each task set, by its name."""
