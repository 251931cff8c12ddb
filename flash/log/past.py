"""What a run was at when it ended, and how its next start goes on; every call blocks.

newest checkpoint ─ c ─┬─ redone ─┬─ to train ─┬─ ready, cut off, due
                       │          │            │
                batches with    one without    groups on their way
                their step      its step
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import Any

import msgspec
from sqlalchemy import Connection, case, delete, func, insert, or_, update

from flash.config import Config
from flash.config.resumed import differences, groups_begin_anew, training_settings_differ
from flash.config.task_source import changed_source, source_of
from flash.log.reading import (
    ABANDONED,
    MANY,
    SETTINGS_CHANGED,
    SOURCE_CHANGED,
    Reader,
    Start,
)
from flash.log.schema import BATCHES, EPISODES, EXPERT_SAMPLES, GROUPS, SAMPLES, STARTS, STEPS
from flash.log.store import Store
from flash.rollout.adaptive import AlphaState
from flash.rollout.committed import INTERRUPTED
from flash.rollout.record import EpisodeRecord
from flash.rollout.restored import Restored
from flash.rollout.tasks import Tasks

logger = logging.getLogger(__name__)

_NOTHING = Restored()


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """How a run stood; of a new one, at nothing.

    Args:
        start: the number of the start that begins now.
        checkpoint: the version of the checkpoint that it goes on from; 0 without one.
        known: what the starts before called later versions will never be again.
        redo: versions whose batches are to be trained again, in their order, and told to nobody.
        with_other_settings: of those of `redo` before a version, the settings of the trainer that
            they were trained with, one after another; the rest have the present ones.
        restored: what rollout goes on with; its batches come after those of `redo`.
        ended_here: how many starts before, in a row, ended at the first of these batches: it was
            handed over, and its step never came.
        again: seeds of tasks that had begun, and are to begin anew; by task set.
        dispatched: the seeds of all tasks that began; likewise.
        steps: the line of each step that was done.
        done_in: the start that each was done in.
        records: what became of each episode that ended.
        known_expert: digests of what was imitated.
    """

    start: int = 1
    checkpoint: int = 0
    known: int = 0
    redo: Sequence[int] = ()
    with_other_settings: Sequence[tuple[int, Mapping[str, Any]]] = ()
    restored: Restored = _NOTHING
    ended_here: int = 0
    again: Mapping[str, Sequence[int]] = field(default_factory=dict)
    dispatched: Mapping[str, Sequence[int]] = field(default_factory=dict)
    alpha: AlphaState | None = None
    steps: Sequence[Mapping[str, Any]] = ()
    done_in: Mapping[int, int] = field(default_factory=dict)
    records: Sequence[EpisodeRecord] = ()
    known_expert: Sequence[str] = ()
    first_numbers: tuple[int, int, int] = (0, 0, 0)

    def tasks(self, seed: int, *, task_set: str = "") -> Tasks:
        """Of a run of that seed: those that are still to begin."""
        begun, again = self.dispatched.get(task_set, ()), self.again.get(task_set, ())
        return Tasks(seed, task_set=task_set, dispatched=begun, again=again)

    @property
    def version(self) -> int:
        """That of the policy, once `redo` is done."""
        return self.checkpoint + len(self.redo)

    @property
    def logged_version(self) -> int:
        """Batches before that are in the log."""
        return self.version + sum(part.last for part in self.restored.batches)

    @property
    def steps_done(self) -> int:
        """The last step that was done."""
        return max((line["step"] for line in self.steps), default=0)

    def known_of(self, start: int) -> int:
        """The newest of a start's versions whose weights are still what they were then.

        What it did not log, a start after it did anew, perhaps with other settings.
        """
        anew = (step - 1 for step, done_in in self.done_in.items() if done_in > start)
        return min([self.known, *anew])

    def describe(self) -> str:
        """In a line, what the run goes on with."""
        groups = self.restored.groups
        ready = sum(len(group.ready) for group in groups)
        cut_off = sum(bool(due.history) for group in groups for due in group.due)
        batches = len(self.redo) + sum(part.last for part in self.restored.batches)
        return (
            f"goes on from {f'step {self.checkpoint}' if self.checkpoint else 'the first model'}, "
            f"with {batches} logged batches to train, {ready} ready episodes and {cut_off} cut off"
        )

    @property
    def has_begun(self) -> bool:
        """Whether the policy that it began with was evaluated."""
        return bool(self.steps)


def take_over(store: Store, *, checkpoint: int | None, config: Config) -> Past:
    """The run's past, mended; from now on this process is the one that writes the log.

    Args:
        checkpoint: the version to go on from; None for a run that begins.
        config: that it goes on with, which is compared with what the log says of the starts before.

    ValueError if the log can't be that of the checkpoint.
    """
    store.own()
    source = source_of(config)
    known = 0 if checkpoint is None else _mend(store, checkpoint, config, source)
    with store.transaction() as connection:
        reader = Reader(connection, store.run)
        past = Past(start=len(reader.starts()) + 1)
        if checkpoint is not None:
            past = replace(_read(reader, checkpoint, config, source), known=known)
            _interrupt(connection, store.run)
            past = replace(past, records=[EpisodeRecord.of_row(row) for row in reader.ended()])
        connection.execute(
            insert(STARTS).values(
                run=store.run,
                start=past.start,
                at=time.time(),
                version=past.version,
                config=config.model_dump(mode="json"),
                source=source,
                flash=metadata.version("flash-rl"),
            )
        )
    return past


def _read(reader: Reader, checkpoint: int, config: Config, source: str) -> Past:
    starts = reader.starts()
    steps = reader.steps()
    done = max((row.step for row in steps), default=0)
    batches = reader.whole_batches(checkpoint)
    redo = {version: start for version, start in batches.items() if version < done}
    alpha = next((row.alpha for row in reversed(steps) if row.alpha is not None), None)
    return Past(
        start=len(starts) + 1,
        checkpoint=checkpoint,
        redo=list(redo),
        with_other_settings=_with_other_settings(redo, starts, config),
        restored=Restored(
            groups=reader.open_groups(
                episodes={
                    name: of_set.group_size + config.rollout.redundant_episodes
                    for name, of_set in config.sets.items()
                },
                max_attempts=config.rollout.max_attempts,
            ),
            reusable=reader.used_groups(
                max(batches, default=checkpoint - 1) + 1,
                alpha=config.alpha,
                most_uses=config.rollout.reuse.uses,
                since_start={
                    name: _first_alike(starts, config, source, name) for name in config.sets
                },
            ),
            batches=[
                part for version in batches if version >= done for part in reader.batch(version)
            ],
            first_ids=reader.first_ids(),
        ),
        ended_here=_ended_at(done, batches, starts),
        again=reader.to_begin_anew(),
        dispatched=reader.dispatched(),
        alpha=alpha and msgspec.convert(alpha, AlphaState),
        steps=[row.metrics for row in steps],
        done_in={row.step: row.start for row in steps},
        first_numbers=reader.first_numbers(),
        known_expert=reader.known_expert(),
    )


def _with_other_settings(
    redo: Mapping[int, int], starts: Sequence[Start], config: Config
) -> list[tuple[int, Mapping[str, Any]]]:
    """See `Past`; `redo` says in which start each version's batch was trained."""
    configs = {start.start: start.config for start in starts}
    others = {start.start for start in starts if _trains_otherwise(start, config)}
    last = max((version for version, start in redo.items() if start in others), default=-1)
    until = {start: version + 1 for version, start in redo.items() if version <= last}
    return [(end, configs[start]["trainer"]) for start, end in until.items()]


def _ended_at(version: int, batches: Mapping[int, int], starts: Sequence[Start]) -> int:
    """Of the starts, which ended with that batch handed over and without its step."""
    if version not in batches:
        return 0
    return 1 + sum(start.start > batches[version] for start in starts)


def _trains_otherwise(start: Start, config: Config) -> bool:
    return training_settings_differ(differences(start.config, config))


def _interrupt(connection: Connection, run: int) -> None:
    """Ends the episodes that ran: others go on in their places."""
    connection.execute(
        update(EPISODES)
        .where(
            EPISODES.c.run == run,
            EPISODES.c.outcome.is_(None),
            EPISODES.c.played_at.is_(None),
        )
        .values(outcome="cancelled", reason=INTERRUPTED, ended_at=time.time())
    )


def _why_anew(before: Start, config: Config, source: str, task_set: str) -> str:
    """The reason that a set's groups of an earlier start end for; empty if they go on."""
    if task_set not in config.sets:
        return SETTINGS_CHANGED
    if changed_source(before.source, source, task_set=task_set):
        return SOURCE_CHANGED
    found = differences(before.config, config)
    return SETTINGS_CHANGED if groups_begin_anew(found, task_set=task_set) else ""


def _first_alike(starts: Sequence[Start], config: Config, source: str, task_set: str) -> int:
    """The first start of those at whose end a set's groups would have gone on until now."""
    others = [start.start for start in starts if _why_anew(start, config, source, task_set)]
    return max(others, default=0) + 1


def _mend(store: Store, checkpoint: int, config: Config, source: str) -> int:
    """Takes back what can't be gone on with; the newest version whose weights stay what they were.

    Parts of a batch whose last part never came. All from the first batch on that can't be trained
    again, because the log has its samples no longer. What was sampled by weights that will never
    be again, which must not be taken for what those of the same number will sample. Groups on
    their way, if their next episodes would not be like their first.
    """
    run = store.run
    with store.transaction() as connection:
        reader = Reader(connection, run)
        whole = reader.whole_batches(0)
        known = max(whole, default=-1) + 1
        if known < checkpoint:
            raise ValueError(
                f"the checkpoint is of version {checkpoint}, and the log knows batches up to "
                f"version {known} only: give the log.url that the run had, or the log that "
                f"belongs to the checkpoint"
            )
        reached = checkpoint
        while reached in whole and reader.has_samples(reached):
            reached += 1
        if known > reached:
            _tell_of_lost(reached, known)
        for table in (BATCHES, SAMPLES, EXPERT_SAMPLES):
            connection.execute(delete(table).where(table.c.run == run, table.c.version >= reached))
        # The step that makes version v is step v.
        connection.execute(delete(STEPS).where(STEPS.c.run == run, STEPS.c.step > reached))
        _give_up(connection, run, reader.groups_trained_from(reached), ABANDONED)
        # A step that was not done is done with the present settings, and makes other weights then.
        done = max([checkpoint, *(row.step for row in reader.steps())])
        starts = reader.starts()
        since = min((whole[version] for version in range(done, reached)), default=len(starts))
        again_the_same = not any(_trains_otherwise(start, config) for start in starts[since - 1 :])
        newest = reached if again_the_same else min(reached, done)
        _give_up(connection, run, reader.open_groups_beyond(newest), ABANDONED)
        under_way = reader.open_group_ids()
        for task_set in {**config.sets, **under_way} if starts else ():
            reason = _why_anew(starts[-1], config, source, task_set)
            if reason == SOURCE_CHANGED:
                changed = changed_source(starts[-1].source, source, task_set=task_set)
                logger.warning(
                    "tasks are other ones than before, and groups begin anew: %s", changed
                )
            if reason:
                _give_up(connection, run, under_way.get(task_set, []), reason)
    return newest


def _tell_of_lost(reached: int, known: int) -> None:
    """ValueError if nothing is left to go on with."""
    what = f"the log has the samples of version {reached} no longer"
    if reached == 0:
        raise ValueError(f"{what}, and there is no whole checkpoint: start anew under another name")
    logger.warning("%s: the steps from %d to %d are done anew", what, reached + 1, known)


def _give_up(connection: Connection, run: int, groups: Sequence[int], reason: str) -> None:
    """These groups came to nothing, and their tasks are to begin anew."""
    for first in range(0, len(groups), MANY):
        some = groups[first : first + MANY]
        connection.execute(
            update(EPISODES)
            .where(
                EPISODES.c.run == run,
                EPISODES.c.group.in_(some),
                or_(EPISODES.c.outcome.is_(None), EPISODES.c.outcome == "trained"),
            )
            .values(
                outcome=case((EPISODES.c.played_at.is_(None), "cancelled"), else_="dropped"),
                reason=reason,
                ended_at=func.coalesce(EPISODES.c.ended_at, time.time()),
                trained_at_version=None,
            )
        )
        connection.execute(
            update(GROUPS)
            .where(GROUPS.c.run == run, GROUPS.c.group.in_(some))
            .values(outcome="dropped", reason=reason, ended_at=time.time())
        )
