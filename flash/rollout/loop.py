"""The rollout loop: admits, supervises and collects episodes, enforces α, feeds the trainer.

    tasks ──► admission (slots, α) ──► Crew of agents ──► groups ──► hand-over ──► trainer
                  ▲                                          │           │
                  └────────── regenerate / replace ◄── eviction (α)      │
                  └────────── slots freed by publish ◄───────────────────┘
                                                         Reuse ◄─►┘ trained before

Everything here runs between two awaits of one event loop; the only waits are `next_batch` (for
an episode to end) and `publish` (for the hub). What always holds:

1. No token in a batch is older than α versions: `_evict_stale`, and a check at hand-over.
2. Each admitted episode has one outcome: `Ledger.end`, once, and `Ledger.check`.
3. running + ready + handed over but unpublished ≤ (1+α)·batch: `Admission` and `Slots`.
5. No wait is silent: a streak of failures ends the run by name, and `Watchdog` looks to the rest.
"""

import asyncio
import contextlib
import logging
import math
from collections import Counter, deque
from collections.abc import (
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, Self

from flash.errors import EpisodeFailure, RolloutFailure
from flash.hub.reports import PublishReport
from flash.rollout.batching import Numbers, parts_of, samples_of, trajectories
from flash.rollout.bias import LengthBias
from flash.rollout.choosing import Chooser
from flash.rollout.committed import INTERRUPTED, OVER, SHUTDOWN, CommitLog, NoLog
from flash.rollout.config import RolloutSettings
from flash.rollout.crew import AgentCrew, Crew, SessionHub
from flash.rollout.episode import AgentFactories, Cancelled, Episode, EpisodeEnd
from flash.rollout.filters import GroupFilter, find_filter
from flash.rollout.groups import Group, Groups
from flash.rollout.ledger import Ledger
from flash.rollout.observer import Observer, Observers
from flash.rollout.record import EpisodeRecord
from flash.rollout.restored import DueEpisode, OpenGroup, ReadyEpisode, Restored, UsedGroup
from flash.rollout.shares import Share, Shares
from flash.rollout.stall.activity import Activity
from flash.rollout.stall.diagnosis import AdmissionState
from flash.rollout.stall.watchdog import PAUSE, RestartingHub, Watchdog
from flash.rollout.tasks import TaskSet
from flash.trainer.advantages import Advantages, grpo, per_group
from flash.types import Batch, ExpertShare, Outcome, Task, TrainerState, Trajectory, Weights

logger = logging.getLogger(__name__)

_STARTS_A_TURN = 32  # each costs 0.1 ms or so until it waits: a batch's must not hold the loop
_GRPO = per_group(grpo)
_NOTHING = Restored()


class RolloutHub(SessionHub, RestartingHub, Protocol):
    """What the loop needs of the InferenceHub."""

    @property
    def version(self) -> int: ...

    async def publish(self, weights: Weights) -> PublishReport: ...


class RolloutLoop:
    """Keeps agents busy, and hands over batches of whole groups that are fresh enough.

    >>> async with RolloutLoop(hub, agent=make_agent, tasks=tasks, batch_size=64,
    ...                        group_size=8, alpha=2) as rollouts:
    ...     batch = await rollouts.next_batch()
    ...     weights = ...  # train on it
    ...     await rollouts.publish(weights)

    Args:
        hub: answers the agents' requests and publishes weights.
        agent: makes an actor; called once for each episode that runs at the same time. With task
            sets it may be a mapping: from the name of a set to what makes its agents.
        crew: plays the episodes, in the place of agents in this process.
        tasks: where groups come from, in order; may be endless.
        batch_size: samples in a batch, a multiple of `group_size`.
        task_sets: several kinds of tasks, in the place of `tasks` and `group_size`; their groups in
            a batch must be of `batch_size` samples together.
        alpha: the asynchronous ratio. A token sampled by version u is trained at version v only
            if v - u ≤ alpha, and (1+alpha)·batch_size samples at most are under way. 0 is
            synchronous. A fraction adds room for work, not for age.
        settings: which episodes begin, and what becomes of those that fail, grow old or teach
            nothing: the `rollout` section of a configuration.
        filters: more filters than `settings.filters` names. A complete group that one of them
            drops is replaced by another task's.
        advantages: of the episodes of a batch; `per_group` makes it of a function of the rewards
            of one group.
        last_version: the version at which training ends; what no batch until then can take is
            neither begun nor played to its end.
        restored: what it goes on with, of a run that ended before.
        observers: hear of each event.
        log: one of the observers, which makes what it is told outlive a crash. An episode counts
            as ready, and a batch is handed over, when the log has committed it.
        expert: what the batch of a version imitates beside its samples; asked once for each.
        trainer, caller_timeout_s: what the trainer is at, if anybody knows; how long the caller
            may do neither of the loop's calls. See `Watchdog`.

    Errors: `next_batch` and `publish` raise RolloutFailure when the loop can't go on, the hub's
    own failures (InferenceFailure, PublishFailure) with their causes, and what `tasks`, `agent` or
    an observer raised.
    """

    def __init__(
        self,
        hub: RolloutHub,
        *,
        agent: AgentFactories | None = None,
        crew: Crew | None = None,
        tasks: Iterable[Task] = (),
        batch_size: int,
        group_size: int = 1,
        task_sets: Sequence[TaskSet] = (),
        alpha: float = 1.0,
        settings: RolloutSettings = RolloutSettings(),  # noqa: B008  (frozen)
        filters: Sequence[GroupFilter] = (),
        advantages: Advantages = _GRPO,
        last_version: int | None = None,
        restored: Restored = _NOTHING,
        observers: Iterable[Observer] = (),
        log: CommitLog | None = None,
        expert: Callable[[int], ExpertShare] | None = None,
        trainer: Callable[[], TrainerState] | None = None,
        caller_timeout_s: float = 3600.0,
    ) -> None:
        if group_size < 1 or batch_size < 1 or batch_size % group_size:
            raise ValueError(
                f"batch_size={batch_size} must be a positive multiple of group_size={group_size}"
            )
        whole = TaskSet(
            name="", tasks=tasks, groups_per_batch=batch_size // group_size, group_size=group_size
        )
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha={alpha} must be a number of at least 0; 0 is synchronous")
        self.hub = hub
        self.alpha = alpha
        self.settings = settings
        self.ledger = Ledger(most_uses=settings.reuse.uses)
        self.activity = Activity()
        self._bias = LengthBias()
        self._books = Observers([self.ledger, self._bias, self.activity])
        self._observers = Observers([self._books, Observers(observers, on_error=self.fail)])
        self._log = log or NoLog()
        self._expert = expert
        self._advantages = advantages
        self._next_episode, first_group = restored.first_ids
        self._groups = Groups(first_group)
        self._shares = Shares(
            task_sets or [whole],
            self._groups,
            settings=settings,
            filters=[*map(find_filter, settings.filters), *filters],
            alpha=alpha,
            last_version=last_version,
            ledger=self.ledger,
        )
        if self._shares.batch_size != batch_size:
            raise ValueError(
                f"batch_size={batch_size}: the groups of task_sets are {self._shares.batch_size} "
                f"samples together"
            )
        self._groups_per_batch = self._shares.groups_per_batch
        self._chooser = Chooser(
            self._groups, self._shares, alpha=alpha, waits=settings.on_stale == "wait"
        )
        together = not settings.replicate
        self._crew = crew or _agents(agent, hub, together=together, shares=self._shares)
        self._crew.report_to(
            on_end=self._on_end,
            on_fatal=self.fail,
            witness=self._observers,
            oldest_wanted=lambda: math.ceil(self._next_version - self.alpha),
        )
        self._watchdog = Watchdog(
            self,
            stall_timeout_s=settings.stall_timeout_s,
            caller_timeout_s=caller_timeout_s,
            on_stall=settings.on_stall,
            trainer=trainer,
            on_stalled=self._observers.stalled,
        )
        self._to_train = deque(restored.batches)
        for group in restored.groups:
            self._shares.of(group.task).to_restore.append(group)
        for used in restored.reusable:
            self._restore_used(used)
        self._open = False
        self._paused = False
        self._taken: dict[Group, None] = {}  # of the next batch, handed over as parts of it
        self._chosen: dict[Group, None] = {}  # those, and what is handed over now
        self._handing_over: Generator[None, None, Batch] | None = None
        self._closing = False  # what was chosen leaves the groups, one by one
        self._uncommitted: Batch | None = None  # handed over, but for its commit
        self._next_version = hub.version  # at which the next batch will be trained
        self._started_this_turn = 0
        self._waits_for_log = False
        self._failure: Exception | None = None
        self._failures_in_a_row = 0
        self._progress = asyncio.Event()
        self.use_alpha(alpha)

    async def __aenter__(self) -> Self:
        await self._crew.__aenter__()
        await self._watchdog.__aenter__()
        for batch in self._to_train:
            if batch.last:
                self._shares.hold(batch.version)
                self._next_version = batch.version + 1
        self._expect_reuse()
        self._restore_groups()
        self._open = True
        self._admit()
        return self

    async def __aexit__(self, *exc_info: Any) -> None:
        """Ends what runs (cancelled) and what waits (dropped), for the reason `shutdown`."""
        self._open = False
        while self._closing:  # whoever waited for that batch was cancelled
            self._hand_over_further()
        for group in list(self._groups):
            self._give_up(group, SHUTDOWN)
        try:
            await self._crew.__aexit__(*exc_info)
        finally:
            await self._watchdog.__aexit__(*exc_info)

    # ── what the trainer's side calls ────────────────────────────────────────────────────────

    async def next_batch(self) -> Batch:
        """Waits for enough complete, fresh groups; consumes them, oldest first.

        What unblocks it: an episode that ends. What it never waits for: a running group while
        enough others are complete, unless `on_stale` is `wait` and it would grow too old. With
        `settings.reuse` groups that were trained before take the places that are left.
        """
        if self._taken and self._handing_over is None:
            raise ValueError("a batch was begun with next_part: take its other parts likewise")
        with self.activity.call("next_batch"):
            return await self._next_committed(self._next_whole)

    async def next_part(self) -> Batch:
        """As `next_batch`, but waits for one complete group only, and hands over all there are.

        With the last part (`Batch.last`) the batch is whole; until then its version is the same,
        its episodes are not counted as trained, and nothing of it is lost if no more are taken.
        """
        with self.activity.call("next_part"):
            return await self._next_committed(partial(self._next, 1))

    async def _next_committed(self, choose: Callable[[], Awaitable[Batch]]) -> Batch:
        """Of a call that was cancelled meanwhile the next one gets what was handed over."""
        if self._uncommitted is None:
            self._uncommitted = await choose()
        await self._log.committed()
        batch, self._uncommitted = self._uncommitted, None
        return batch

    async def _next_whole(self) -> Batch:
        batch = await self._next(self._groups_per_batch)
        while not batch.last:  # it was handed over in parts before the run ended
            part = await self._next(self._groups_per_batch)
            batch = replace(part, samples=[*batch.samples, *part.samples])
        return batch

    async def _next(self, at_least: int) -> Batch:
        while True:
            if self._failure is not None:
                raise self._failure
            if self._to_train:  # it was handed over before the run ended
                self._observers.handed_over(batch := self._to_train.popleft())
                return batch
            if self._handing_over is None:
                fresh, again = self._choose(at_least)
                if fresh or again:
                    self._chosen = dict.fromkeys([*self._taken, *fresh])
                    self._handing_over = self._hand_over(fresh, again, self._next_version)
            elif (handed_over := self._hand_over_further()) is not None:
                return handed_over
            if self._handing_over is not None:
                await asyncio.sleep(0)
                continue
            for share in self._shares:
                self._check_tasks(share)
            self._progress.clear()
            await self._progress.wait()

    def _check_tasks(self, share: Share) -> None:
        """RolloutFailure if there are too few for the next batch."""
        left, needed = share.counts.groups, share.needed(self._next_version)
        if share.admission.exhausted and not share.admission and left < needed:
            of = f" of task set {share.name}" if share.name else ""
            raise RolloutFailure(
                f"the tasks{of} have ended with {left} groups left, and a batch takes "
                f"{needed}: give more tasks, or ask for fewer batches"
            )

    async def publish(self, weights: Weights) -> PublishReport:
        """Make these weights the policy, then free the slots of the batches they were made from.

        Waits for every worker; at the others sampling goes on.
        """
        if self._failure is not None:
            raise self._failure
        with self.activity.call("publish"):
            self._next_version = max(self._next_version, weights.version)
            report = await self.hub.publish(weights)
            self._shares.release(weights.version)
            self._expect_reuse()
            self._observers.published(report)
            self._evict_stale()
            self._admit()
            return report

    def use_alpha(self, alpha: float) -> None:
        """Let (1+alpha)·batch samples be under way from now on; `self.alpha` stays the bound."""
        if not 0 <= alpha <= self.alpha:
            raise ValueError(f"alpha={alpha} must be from 0 to the loop's bound of {self.alpha:g}")
        self.alpha_in_force = alpha
        self._shares.use_alpha(alpha)
        self._admit()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No episode begins while the block runs; those that run go on, and batches get ready.

        What the block waits for needs deadlines of its own: the watchdog leaves it alone.
        """
        with self.activity.call(PAUSE):
            self._paused = True
            try:
                yield
            finally:
                self._paused = False
                self._admit()

    # ── how it stands ────────────────────────────────────────────────────────────────────────

    @property
    def capacity(self) -> int:
        """So many episodes run or are ready at most."""
        return self._shares.most_episodes

    @property
    def crew_waits_for(self) -> str:
        """What must come before any episode can be played, and may take its time; often nothing."""
        return self._crew.waits_for

    @property
    def crashes(self) -> int:
        """Agents that crashed and were replaced."""
        return self._crew.crashes

    def ages(self) -> dict[str, Counter[int]]:
        """Of each task set: how many running or ready episodes with tokens are how old, by next
        training version - oldest token."""
        ages: dict[str, Counter[int]] = {share.name: Counter() for share in self._shares}
        for episode in self.episodes():
            if episode.oldest_version is not None:
                ages[episode.task.task_set][self._next_version - episode.oldest_version] += 1
        return ages

    def episodes(self) -> list[Episode]:
        """The episodes on their way into a batch, oldest group first."""
        return [m for group in self._groups for m in group.members.values()]

    def under_way(self) -> list[Episode]:
        """The episodes that run, with those that were given up and are not gone yet."""
        return self._crew.episodes()

    def admission_state(self) -> AdmissionState:
        return AdmissionState(
            next_version=self._next_version,
            fresh=self._fresh_enough,
            due=self._shares.due,
            unpublished=self._shares.held,
            log=self._log.blocked,
        )

    # ── what the watchdog does ───────────────────────────────────────────────────────────────

    def replace(self, episode: Episode) -> None:
        """Cancels a running episode, and starts its task again."""
        group = self._groups.get(episode.group)
        if group is not None and episode.id in group.members:
            self._restart(group, episode)
            self._discard(episode, "stall")

    def fail(self, error: Exception) -> None:
        """The first error that no episode can be blamed for; `next_batch` raises it."""
        if self._failure is None:
            self._failure = error
        self._progress.set()

    # ── admission ────────────────────────────────────────────────────────────────────────────

    def _admit(self) -> None:
        """Starts episodes while there are slots, and while what they'd sample could be trained.

        Those of a burst, a few in each turn of the event loop.
        """
        if not self._open or self._paused or self._closing or not self._fresh_enough:
            return
        if self._log.blocked:
            self._admit_after_commit()
            return
        try:
            self._restore_groups()
            while (
                self._started_this_turn < _STARTS_A_TURN
                and self._failure is None
                and (start := self._shares.next_start(self._next_version)) is not None
            ):
                self._start(*start)
        except Exception as error:  # of the tasks or of the agent's making: nobody awaits this
            self.fail(error)
        if any(share.admission.exhausted for share in self._shares):
            self._progress.set()

    def _admit_after_commit(self) -> None:
        if not self._waits_for_log:
            self._waits_for_log = True
            self._log.after_commit(self._log_goes_on)

    def _log_goes_on(self) -> None:
        self._waits_for_log = False
        self._admit()

    @property
    def _fresh_enough(self) -> bool:
        """Whether what begins now could be trained, if it goes into the next batch."""
        return self._next_version - self.hub.version <= self.alpha

    def _start(self, group: Group, due: DueEpisode) -> None:
        oldest = due.oldest_version
        fresh = oldest is None or self._next_version - oldest <= self.alpha
        episode = self._crew.begin(
            self._next_episode,
            group.task,
            group=group.id,
            attempt=due.attempt,
            history=due.history if fresh else (),
            continues=due.episode,
        )
        self._next_episode += 1
        self._groups.add(group, episode)
        self._observers.admitted(episode)
        if self._started_this_turn == 0:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._started_this_turn += 1

    def _next_turn(self) -> None:
        self._started_this_turn = 0
        self._admit()

    # ── ends of episodes ─────────────────────────────────────────────────────────────────────

    def _on_end(self, episode: Episode, end: EpisodeEnd) -> None:
        """Called by the crew, once for each episode it was given."""
        group = self._groups.get(episode.group)
        if group is not None and episode.id not in group.members:
            group = None  # it was given up
        if isinstance(end, Trajectory):
            episode.finish(end)
        self._observers.played(episode)
        if isinstance(end, Trajectory):
            self._failures_in_a_row = 0
            if group is None:  # it finished in the moment it was given up
                self._end(episode, "dropped", episode.cancel_reason or SHUTDOWN)
            else:
                self._log.after_commit(partial(self._count_ready, group, episode))
        elif isinstance(end, Cancelled):
            self._end(episode, "cancelled", episode.cancel_reason or SHUTDOWN)
            if group is not None:
                self._restart(group, episode, end)
        else:
            self._end(episode, "failed", end.kind)
            if group is not None:
                self._after_failure(group, episode, end)
        self._admit()
        self._progress.set()

    def _count_ready(self, group: Group, episode: Episode) -> None:
        """Its trajectory is safe, and may go into a batch; unless it was given up meanwhile."""
        if group not in self._groups or episode.id not in group.members:
            return
        self._groups.finish(group, episode)
        if group.complete:
            self._after_completion(group)
        self._admit()
        self._progress.set()

    def _restore_groups(self) -> None:
        """Goes on with those that there is room for: with a smaller α than they began under not
        all of them, and what is ready of some would leave no slot to what others lack."""
        for share in self._shares:
            while share.can_restore:
                self._restore(share.to_restore.popleft())
                self._cancel_redundant()
                self._evict_stale()
            share.admission.new_groups = not share.to_restore

    def _restore(self, restored: OpenGroup) -> None:
        """Goes on with a group that was on its way when the run ended."""
        share = self._shares.of(restored.task)
        group = self._groups.restore(restored.group, restored.task, size=share.group_size)
        for ready in restored.ready:
            episode = self._restored_episode(group, ready)
            self._books.admitted(episode)
            episode.finish(ready.trajectory)
            self._books.played(episode)
            if group.complete:
                self._end(episode, "dropped", "redundant")
                continue
            self._groups.add(group, episode)
            self._groups.finish(group, episode)
        share.admission.restore(group, restored.due)
        if group.complete:
            self._after_completion(group)
        elif len(group.members) + group.due < group.size:
            self._give_up(group, "group_failed")  # fewer attempts are allowed than before

    def _restore_used(self, used: UsedGroup) -> None:
        share = self._shares.of(used.task)
        group = Group(used.group, used.task, share.group_size)
        for ready in used.episodes:
            episode = group.members[ready.episode] = self._restored_episode(group, ready)
            episode.finish(ready.trajectory)
        share.reuse.keep(group, used.uses)

    def _restored_episode(self, group: Group, ready: ReadyEpisode) -> Episode:
        episode = Episode(
            ready.episode, group.task, hub=self.hub, group=group.id, attempt=ready.attempt
        )
        episode.prompt_tokens = ready.prompt_tokens
        episode.generated_tokens = ready.generated_tokens
        episode.turns = ready.trajectory.turns
        return episode

    def _after_completion(self, group: Group) -> None:
        """The group's spares are cancelled; then it is kept or dropped; then others may be."""
        for member in list(group.members.values()):
            if not member.ready:
                self._groups.remove(group, member)
                self._discard(member, "redundant")
        share = self._shares.of(group.task)
        share.admission.cancel(group)
        try:
            reason = share.filters.reason_to_drop(trajectories(group))
        except RolloutFailure as failure:
            self.fail(failure)
            return
        if reason is not None:
            self._give_up(group, reason)
        self._cancel_redundant()

    def _cancel_redundant(self) -> None:
        """Gives up what runs for nothing: complete groups fill every batch that they could."""
        for share in self._shares:
            complete, slots = share.counts.complete, share.slots
            if slots.needed(complete=complete, next_version=self._next_version) > 0:
                continue
            reason = "redundant" if slots.room(complete=complete) <= 0 else OVER
            for group in list(self._groups):
                if group.task.task_set == share.name and not group.complete:
                    self._give_up(group, reason)

    def _after_failure(self, group: Group, episode: Episode, failure: EpisodeFailure) -> None:
        logger.warning("%s failed: %s", episode.describe(), failure)
        self._groups.remove(group, episode)
        self._failures_in_a_row += 1
        # Everything under way may fail at once for one cause (a host that died), and that is
        # nothing to stop for; but not again and again with no success between.
        if self._failures_in_a_row >= self.settings.max_attempts * max(self.capacity, 8):
            error = RolloutFailure(
                f"{self._failures_in_a_row} episodes failed and none came to its end between; "
                f"the last one: {failure}"
            )
            error.__cause__ = failure
            self.fail(error)
        elif episode.attempt < self.settings.max_attempts:
            due = DueEpisode(attempt=episode.attempt + 1)
            self._shares.of(group.task).admission.start_again(group, due)
        elif len(group.members) + group.due < group.size:
            logger.warning("group %d is given up after %d attempts", group.id, episode.attempt)
            self._give_up(group, "group_failed")

    def _restart(self, group: Group, episode: Episode, cut_off: Cancelled | None = None) -> None:
        """In the place of an episode that is no failure: it does not count as an attempt."""
        self._groups.remove(group, episode)
        due = DueEpisode(attempt=episode.attempt)
        if cut_off is not None and episode.cancel_reason == INTERRUPTED:
            due = replace(due, episode=episode.id, history=cut_off.history)
        self._shares.of(group.task).admission.start_again(group, due)

    def _give_up(self, group: Group, reason: str) -> None:
        """Drops the group's ready episodes, cancels the running ones; its slots become free."""
        self._groups.close(group)
        self._observers.given_up(group.id, reason)
        for member in group.members.values():
            self._discard(member, reason)

    def _discard(self, episode: Episode, reason: str) -> None:
        if episode.trajectory is None:
            self._crew.give_up(episode, reason)
        else:
            self._end(episode, "dropped", reason)

    def _end(
        self, episode: Episode, outcome: Outcome, reason: str = "", version: int | None = None
    ) -> None:
        record = EpisodeRecord.of(episode, outcome, reason, version=version)
        self._observers.ended(episode, record)

    # ── staleness ────────────────────────────────────────────────────────────────────────────

    def _evict_stale(self) -> None:
        """Gives up every episode that would break the bound in the next batch already."""
        safe = self._chosen or self._taken
        for group in [group for group in self._groups if group not in safe]:
            old = group.older_than(self._next_version - self.alpha)
            if old and self.settings.on_stale == "drop":
                self._give_up(group, "stale")
                continue
            group.regenerations += bool(old)
            if group.regenerations > self.settings.max_regenerations:
                logger.warning(
                    "group %d (%s) was too slow for alpha=%g %d times and is given up "
                    "(rollout.max_regenerations); rollout.on_stale=wait would wait for it",
                    group.id, group.task, self.alpha, group.regenerations,
                )  # fmt: skip
                self._give_up(group, "too_slow")
                continue
            for member in old:
                self._restart(group, member)
                self._discard(member, "stale")

    def _expect_reuse(self) -> None:
        self._shares.expect_reuse(self._next_version)

    def _choose(self, at_least: int) -> tuple[list[Group], list[Group]]:
        """Fresh groups for the next batch, and such as were trained before; none if there are not
        enough."""
        versions = self._next_version, self.hub.version
        if not self._chooser.may_be_enough(at_least, self._taken, *versions):
            return [], []
        # An episode that was admitted in time may have sampled late, from old weights.
        self._evict_stale()
        self._admit()  # what takes the place of those may be all that there is to wait for
        return self._chooser.choose(at_least, self._taken, *versions)

    def _hand_over_further(self) -> Batch | None:
        """As much as may be done in one turn of the event loop; the batch, if that is all."""
        assert self._handing_over is not None
        try:
            next(self._handing_over)
        except StopIteration as done:
            self._handing_over = None
            batch: Batch = done.value
            return batch
        except BaseException:
            self._handing_over = None
            raise
        return None

    def _hand_over(
        self, fresh: list[Group], again: list[Group], version: int
    ) -> Generator[None, None, Batch]:
        """Between two of its turns anything may happen but to what was chosen.

        While its groups close one by one no episode begins, or it would take the slot of one that
        is in the batch.
        """
        try:
            samples = yield from samples_of(
                [*fresh, *again], version=version, alpha=self.alpha, advantages=self._advantages
            )
            whole, numbers = [*self._chosen], Numbers(version)
            if len(whole) + len(again) < self._shares.groups_per_batch:
                for part in parts_of(fresh):
                    numbers.add(part)
                    yield
                batch = Batch(
                    samples=samples, version=version, last=False, metrics=numbers.metrics()
                )
                self._taken = self._chosen
                self._observers.handed_over(batch)
                return batch
            self._taken, self._closing = {}, True
            for part in parts_of(whole):
                numbers.add(part)
                for group in part:
                    self._groups.close(group)
                    for member in group.members.values():
                        self._end(member, "trained", version=version)
                yield
            for part in parts_of(again):
                numbers.add_again(part)
                for group in part:
                    uses = self._shares.of(group.task).reuse.uses(group)
                    for member in group.members.values():
                        self._observers.trained_again(member, uses + 1)
                yield
            metrics = numbers.metrics()
            metrics |= self._bias.metrics()
            metrics |= self._shares.reuse_metrics(again, version=version)
            yield
        finally:
            self._chosen, self._closing = {}, False
        expert = None if self._expert is None else self._expert(version)
        batch = Batch(samples=samples, version=version, metrics=metrics, expert=expert)
        self._observers.handed_over(batch)
        self._shares.hold(version)
        self._shares.trained([*whole, *again], version=version)
        self._next_version = max(self._next_version, version + 1)
        self._expect_reuse()
        self._cancel_redundant()
        self._evict_stale()  # at once: what is doomed should not sample while the trainer trains
        self._admit()
        return batch


def _agents(
    agent: AgentFactories | None, hub: SessionHub, *, together: bool, shares: Shares
) -> Crew:
    if agent is None:
        raise ValueError("nobody plays: give agent=, which makes agents, or a crew=")
    names = [share.name for share in shares]
    if isinstance(agent, Mapping) and {*agent} != {*names}:
        raise ValueError(
            f"agent= makes agents for {[*agent]}, and tasks are of {names}: give one for each set"
        )
    return AgentCrew(agent, hub, together=together)
