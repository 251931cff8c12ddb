"""The durable log of a run, as its event loop sees it.

    events ─► rows ─► pending ──one transaction──► Store, in a thread of its own
                         ▲                            │
                         └── the next ones gather ────┴─► who waited for the commit is called

An episode counts as ready, and a batch goes to the trainer, when what was told of it is committed.
The loop never waits for the disk: while one transaction is written the next one gathers; and a
while longer, unless somebody waits for it.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
from sqlalchemy import Table

from flash.errors import LogFailure
from flash.evaluation.result import Evaluation
from flash.hub.reports import PublishReport
from flash.log.schema import (
    BATCHES,
    CHECKPOINTS,
    COMPLETIONS,
    EPISODES,
    EVALUATIONS,
    EXPERT,
    EXPERT_SAMPLES,
    GROUPS,
    OBSERVATIONS,
    PUBLISHES,
    SAMPLES,
    SEQUENCES,
    STEPS,
)
from flash.log.store import Change, StoreError, Verb
from flash.rollout.adaptive import AlphaState
from flash.rollout.committed import LEFT
from flash.rollout.episode import Episode
from flash.rollout.history import Sampled
from flash.rollout.observer import Observer
from flash.rollout.record import EpisodeRecord
from flash.stop import unless
from flash.types import (
    Batch,
    ExpertSequence,
    Observation,
)

logger = logging.getLogger(__name__)

_GATHERS_S = 0.01  # a commit costs a millisecond of a core, and a wait for the disk
_RETRY_S = 1.0
_LONGEST_RETRY_S = 10.0
_TIDY_EVERY = 1000  # commits
_TIDY_AT_END_S = 10.0

Commit = Callable[[Sequence[Change]], Awaitable[None]]


class Log(Observer):
    """Writes down all that a run's observers are told. To be entered, and left last of all.

    Args:
        commit: writes changes; raises StoreError if it can't now, LogFailure if it never can.
        start: the number of this start of the run.
        first_numbers: of a publish, an evaluation and a checkpoint.
        known_version: batches before that are in the log.
        open_groups: that an earlier start began.
        known_expert: digests of what was imitated before.
        alpha: what decides α, as it stands.
        tidy: what of the log is to be deleted next, a bite of it, perhaps nothing; None when there
            is no more for now. A bite is taken between two commits, from the first one on, again
            each `_TIDY_EVERY` of them and after each checkpoint.
        now: seconds since 1970, at any time of the event loop's clock.
        max_lag_s: past it nothing new begins.
        timeout_s: past it what can't be written ends the run.
    """

    def __init__(
        self,
        commit: Commit,
        *,
        start: int,
        first_numbers: tuple[int, int, int] = (0, 0, 0),
        known_version: int = 0,
        open_groups: Iterable[int] = (),
        known_expert: Iterable[str] = (),
        alpha: Callable[[], AlphaState | None] = lambda: None,
        tidy: Callable[[], Awaitable[Sequence[Change] | None]] | None = None,
        now: Callable[[], float],
        max_lag_s: float,
        timeout_s: float,
    ) -> None:
        self._most_lag_s = 0.0
        self._commit_changes = commit
        self._start = start
        self._publishes, self._evaluations, self._checkpoints = first_numbers
        self._known_version = known_version
        self._alpha = alpha
        self._tidy = tidy
        self._tidies = False  # now
        self._tidies_until = math.inf
        self._commits = 0
        self._now = now
        self._max_lag_s = max_lag_s
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._clock = self._loop.time
        self._pending: list[Change] = []
        self._pending_since = 0.0
        self._waiting: list[Callable[[], None]] = []  # for the pending ones
        self._writing: list[Callable[[], None]] | None = None  # for those that are written now
        self._writing_since = 0.0
        self._trouble = ""
        self._failure: LogFailure | None = None
        self._failed = asyncio.Event()
        self._on_failure: Callable[[Exception], None] = lambda failure: None
        self._wake = asyncio.Event()
        self._tasks = asyncio.TaskGroup()
        self._closing = False
        self._groups = set(open_groups)
        self._trained: list[Change] = []  # of episodes, until their batch is told of
        self._trained_groups: set[int] = set()
        self._known_expert = set(known_expert)
        self._steps: dict[int, int] = {}  # of each episode under way, what it is at
        self._parts = 0  # of the next batch

    def fail_with(self, on_failure: Callable[[Exception], None]) -> None:
        """Who is told when it can't be written any more."""
        self._on_failure = on_failure

    # ── what the loop asks of it ─────────────────────────────────────────────────────────────

    @property
    def lag_s(self) -> float:
        """How old the oldest event is that is not on disk."""
        if self._writing is not None:
            return self._clock() - self._writing_since
        return self._clock() - self._pending_since if self._pending else 0.0

    def take_most_lag_s(self) -> float:
        """The longest that anything took to be on disk, since the last call."""
        lag_s, self._most_lag_s = max(self._most_lag_s, self.lag_s), 0.0
        return lag_s

    @property
    def blocked(self) -> str:
        """Why nothing new should begin; empty if it may."""
        if self._trouble:
            return f"the log can't be written: {self._trouble}"
        if (lag_s := self.lag_s) > self._max_lag_s:
            return f"the log's disk is slow: what happened {lag_s:.0f} s ago is not on it"
        return ""

    def after_commit(self, then: Callable[[], None]) -> None:
        """Calls once all that was told until now is committed; at once if it is."""
        if self._pending:
            self._waiting.append(then)
            self._wake.set()
        elif self._writing is not None:
            self._writing.append(then)
        elif self._failure is None:
            then()

    async def committed(self) -> None:
        """Waits until all that was told until now is committed; LogFailure if it can't be."""
        done = asyncio.Event()
        self.after_commit(done.set)
        if not done.is_set():
            await unless(self._failed, done.wait())
        if self._failure is not None:
            raise self._failure

    # ── the writer ───────────────────────────────────────────────────────────────────────────

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._tasks.create_task(self._write(), name="log")
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        """All that was told is on disk; LogFailure if it can't be, and nothing else is wrong."""
        self._closing = True
        self._tidies_until = self._clock() + _TIDY_AT_END_S
        self._wake.set()
        await self._tasks.__aexit__(None, None, None)
        if self._failure is not None and error is None:
            raise self._failure

    async def _write(self) -> None:
        try:
            while self._pending or self._tidies or not self._closing:
                await self._wake.wait()
                if not self._closing:
                    self._wake.clear()
                if self._pending:
                    await self._write_pending()
                while self._tidies:
                    await self._take_a_bite()
                    if self._wake.is_set():
                        break
        except Exception as error:  # what waits for a commit must hear that none will come
            failure = error if isinstance(error, LogFailure) else LogFailure(f"the log: {error!r}")
            failure.__cause__ = None if failure is error else error
            self._failure = failure
            self._failed.set()
            self._on_failure(failure)

    async def _write_pending(self) -> None:
        changes, self._pending = self._pending, []
        self._writing, self._waiting = self._waiting, []
        self._writing_since = self._pending_since
        await self._commit(changes)
        waiting, self._writing = self._writing, None
        self._most_lag_s = max(self._most_lag_s, self._clock() - self._writing_since)
        for then in waiting:
            then()
        if self._commits % _TIDY_EVERY == 0:
            self._start_to_tidy()
        self._commits += 1

    def _start_to_tidy(self) -> None:
        self._tidies = self._tidy is not None

    async def _take_a_bite(self) -> None:
        """It must be written like all else: of what may have been, no other may come next."""
        assert self._tidy is not None
        bite = None
        if self._clock() < self._tidies_until:
            # If it can't be read for longer, the next commit finds that out.
            with contextlib.suppress(StoreError):
                bite = await self._tidy()
        self._tidies = bite is not None
        if bite:
            await self._commit(bite)

    async def _commit(self, changes: Sequence[Change]) -> None:
        """Again and again, until it is done or `timeout_s` are over."""
        pause_s = _RETRY_S
        deadline = self._clock() + self._timeout_s
        while True:
            try:
                await self._commit_changes(changes)
            except StoreError as error:
                if not self._trouble:
                    logger.warning(
                        "the log can't be written: %s; no episode begins until it can, and after "
                        "%g s (log.timeout_s) the run ends", error, self._timeout_s,
                    )  # fmt: skip
                self._trouble = str(error)
                if self._clock() >= deadline:
                    raise LogFailure(
                        f"the log could not be written for {self._timeout_s:g} s (log.timeout_s): "
                        f"{error}: all until then is in it; mend that, and --resume goes on"
                    ) from error
                await asyncio.sleep(min(pause_s, max(0.0, deadline - self._clock())))
                pause_s = min(2 * pause_s, _LONGEST_RETRY_S)
            else:
                if self._trouble:
                    logger.warning("the log can be written again")
                self._trouble = ""
                return

    def _add(self, verb: Verb, table: Table, **values: Any) -> None:
        self._add_all([Change(verb, table, values)])

    def _add_all(self, changes: Sequence[Change]) -> None:
        if self._failure is not None or not changes:
            return
        if not self._pending:
            self._pending_since = self._clock()
            self._loop.call_later(_GATHERS_S, self._wake.set)
        self._pending += changes

    # ── what it hears of ─────────────────────────────────────────────────────────────────────

    def admitted(self, episode: Episode) -> None:
        at, task = self._now(), episode.task
        if episode.group not in self._groups:
            self._groups.add(episode.group)
            self._add(
                "insert", GROUPS, group=episode.group, start=self._start, task_set=task.task_set,
                seed=task.seed, options=dict(task.options), begun_at=at,
            )  # fmt: skip
        self._add(
            "insert", EPISODES, episode=episode.id, group=episode.group, attempt=episode.attempt,
            start=self._start, continues=episode.continues, task_set=task.task_set,
            seed=task.seed, admitted_at=at,
        )  # fmt: skip

    def observed(self, episode: Episode, observation: Observation) -> None:
        self._add(
            "insert", OBSERVATIONS, episode=episode.id, step=self._step(episode), at=self._now(),
            text=observation.text, reward=observation.reward, terminated=observation.terminated,
            truncated=observation.truncated, info=dict(observation.info),
        )  # fmt: skip

    def sampled(self, episode: Episode, step: Sampled) -> None:
        completion = step.completion
        self._add(
            "insert", COMPLETIONS, episode=episode.id, step=self._step(episode), at=self._now(),
            prompt_sum=step.prompt_sum, token_ids=completion.token_ids,
            logprobs=completion.logprobs, versions=completion.versions,
            temperature=completion.temperature, finish_reason=completion.finish_reason,
            worker=completion.worker, experts=completion.experts,
        )  # fmt: skip

    def begun_anew(self, episode: Episode) -> None:
        # Each by its own number: a row of the new beginning may be written with these.
        for step in range(self._steps.get(episode.id, 0)):
            for table in (OBSERVATIONS, COMPLETIONS):
                self._add("delete", table, episode=episode.id, step=step)

    def _step(self, episode: Episode) -> int:
        step = self._steps.get(episode.id, 0)
        self._steps[episode.id] = step + 1
        return step

    def played(self, episode: Episode) -> None:
        trajectory = episode.trajectory
        if trajectory is None:
            return
        self._add(
            "update", EPISODES, episode=episode.id, played_at=self._now(),
            prompt_tokens=episode.prompt_tokens, generated_tokens=episode.generated_tokens,
            reward=trajectory.reward, success=trajectory.success, turns=trajectory.turns,
            version_min=episode.oldest_version, version_max=episode.newest_version,
            turn_rewards=list(trajectory.turn_rewards), turn_states=list(trajectory.turn_states),
            role_rewards=dict(trajectory.role_rewards),
        )  # fmt: skip
        for number, sequence in enumerate(trajectory.sequences):
            self._add(
                "insert", SEQUENCES, episode=episode.id, number=number,
                tokens=sequence.num_tokens, sampled=int((sequence.loss_mask > 0).sum()),
                token_ids=sequence.token_ids, logprobs=sequence.logprobs,
                versions=sequence.versions, loss_mask=sequence.loss_mask,
                temperatures=sequence.temperatures, turns=sequence.turns,
                experts=sequence.experts, role=sequence.role,
            )  # fmt: skip
        self._add("delete", COMPLETIONS, episode=episode.id)  # the sequences have all of them

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        self._steps.pop(episode.id, None)
        if record.reason in LEFT:
            return  # it has no outcome yet: the next start goes on with it
        outcome = {
            "episode": episode.id, "ended_at": self._now(), "outcome": record.outcome,
            "reason": record.reason, "reward": record.reward, "success": record.success,
            "turns": record.turns, "prompt_tokens": record.prompt_tokens,
            "generated_tokens": record.generated_tokens, "version_min": record.version_min,
            "version_max": record.version_max, "trained_at_version": record.trained_at_version,
            "stages_s": record.stages_s,
        }  # fmt: skip
        if record.outcome == "trained":  # of a crash until then, it is as ready as before
            self._trained.append(Change("update", EPISODES, outcome))
            self._trained_groups.add(record.group)
        else:
            self._add("update", EPISODES, **outcome)

    def given_up(self, group: int, reason: str) -> None:
        if reason not in LEFT:
            self._end_group(group, "dropped", reason)

    def _end_group(self, group: int, outcome: str, reason: str) -> None:
        self._groups.discard(group)
        self._add(
            "update", GROUPS, group=group, ended_at=self._now(), outcome=outcome, reason=reason
        )

    def handed_over(self, batch: Batch) -> None:
        if batch.version < self._known_version:
            return
        part, self._parts = self._parts, 0 if batch.last else self._parts + 1
        self._add(
            "insert", BATCHES, version=batch.version, part=part, start=self._start,
            at=self._now(), last=batch.last, metrics=dict(batch.metrics),
            expert_weight=batch.expert and batch.expert.weight,
        )  # fmt: skip
        numbers: dict[int, int] = {}
        for position, sample in enumerate(batch.samples):
            number = numbers[sample.episode] = numbers.get(sample.episode, -1) + 1
            self._add(
                "insert", SAMPLES, version=batch.version, part=part, position=position,
                episode=sample.episode, number=number, group=sample.group,
                advantage=sample.advantage, reward=sample.reward,
            )  # fmt: skip
        self._add_all(self._trained)
        self._trained = []
        for position, sequence in enumerate(batch.expert.sequences if batch.expert else ()):
            self._add(
                "insert", EXPERT_SAMPLES, version=batch.version, part=part, position=position,
                digest=self._expert(sequence),
            )  # fmt: skip
        for group in sorted(self._trained_groups):
            self._end_group(group, "trained", "")
        self._trained_groups.clear()

    def _expert(self, sequence: ExpertSequence) -> str:
        """Its digest; the sequence itself is written once, however often it is imitated."""
        digest = digest_of(sequence)
        if digest not in self._known_expert:
            self._known_expert.add(digest)
            self._add(
                "insert", EXPERT, digest=digest, source=sequence.source,
                token_ids=sequence.token_ids, loss_mask=sequence.loss_mask,
            )  # fmt: skip
        return digest

    def published(self, report: PublishReport) -> None:
        self._add(
            "insert", PUBLISHES, number=self._publishes, version=report.version, at=self._now(),
            report=asdict(report),
        )  # fmt: skip
        self._publishes += 1

    def evaluated(self, evaluation: Evaluation) -> None:
        self._add(
            "insert", EVALUATIONS, number=self._evaluations, at=self._now(),
            version=evaluation.versions[0] if evaluation.versions else None,
            metrics=evaluation.metrics(),
        )  # fmt: skip
        self._evaluations += 1

    def measured(self, metrics: Mapping[str, Any]) -> None:
        alpha = self._alpha()
        self._add(
            "insert", STEPS, step=metrics["step"], start=self._start, at=self._now(),
            metrics=dict(metrics), alpha=alpha and msgspec.to_builtins(alpha),
        )  # fmt: skip

    def saved(self, checkpoint: Path) -> None:
        self._add(
            "insert", CHECKPOINTS, number=self._checkpoints, at=self._now(),
            version=int(checkpoint.name.rpartition("_")[2]), path=str(checkpoint),
        )  # fmt: skip
        self._checkpoints += 1
        self._start_to_tidy()


def digest_of(sequence: ExpertSequence) -> str:
    """Of its tokens and what each counts."""
    token_ids = np.ascontiguousarray(sequence.token_ids, "<i8")
    digest = hashlib.blake2b(token_ids.tobytes(), digest_size=16)
    digest.update(np.ascontiguousarray(sequence.loss_mask, "<f4").tobytes())
    return digest.hexdigest()
