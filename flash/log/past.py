"""What a run was at when it ended, and how its next start goes on; every call blocks.

newest checkpoint ─ c ─┬─ redone ─┬─ to train ─┬─ ready, cut off, due
                       │          │            │
                batches with    one without    groups on their way
                their step      its step
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from sqlalchemy import Connection, case, delete, func, insert, or_, update

from flash.config.task_source import changed_source
from flash.log.reading import (
    ABANDONED,
    INTERRUPTED,
    MANY,
    SETTINGS_CHANGED,
    SOURCE_CHANGED,
    Reader,
    Start,
)
from flash.log.schema import BATCHES, EPISODES, GROUPS, SAMPLES, STARTS, STEPS
from flash.log.store import Store
from flash.rollout.adaptive import AlphaState
from flash.rollout.record import EpisodeRecord
from flash.rollout.restored import Restored

logger = logging.getLogger(__name__)

_NOTHING = Restored()


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """How a run stood; of a new one, at nothing.

    Args:
        start: the number of the start that begins now.
        checkpoint: the version of the checkpoint that it goes on from; 0 without one.
        before: the starts before it.
        redo: versions whose batches are to be trained again, in their order, and told to nobody.
        restored: what rollout goes on with; its batches come after those of `redo`.
        again: seeds of tasks that had begun, and are to begin anew.
        dispatched: the seeds of all tasks that began.
        steps: the line of each step that was done.
        records: what became of each episode that ended.
    """

    start: int = 1
    checkpoint: int = 0
    before: Sequence[Start] = ()
    redo: Sequence[int] = ()
    restored: Restored = _NOTHING
    again: Sequence[int] = ()
    dispatched: Sequence[int] = ()
    alpha: AlphaState | None = None
    steps: Sequence[Mapping[str, Any]] = ()
    records: Sequence[EpisodeRecord] = ()
    first_numbers: tuple[int, int, int] = (0, 0, 0)

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


def take_over(
    store: Store,
    *,
    checkpoint: int | None,
    config: Mapping[str, Any],
    source: str,
    flash: str,
    episodes: int,
    max_attempts: int,
    groups_begin_anew: bool = False,
) -> Past:
    """The run's past, mended; from now on this process is the one that writes the log.

    Args:
        checkpoint: the version to go on from; None for a run that begins.
        config, source: what this start is told, and what its tasks are made from.
        episodes, max_attempts: of a group.
        groups_begin_anew: with this configuration groups on their way can't be gone on with. Nor
            can they be if tasks are made from something else than before.

    ValueError if the log can't be that of the checkpoint.
    """
    store.own()
    if checkpoint is not None:
        _mend(store, checkpoint, _why_anew(store, source, groups_begin_anew))
    with store.transaction() as connection:
        reader = Reader(connection, store.run)
        before = reader.starts()
        past = Past(start=len(before) + 1, before=before)
        if checkpoint is not None:
            past = _read(reader, checkpoint, before, episodes=episodes, max_attempts=max_attempts)
            _interrupt(connection, store.run)
            past = replace(past, records=[EpisodeRecord.of_row(row) for row in reader.ended()])
        connection.execute(
            insert(STARTS).values(
                run=store.run,
                start=past.start,
                at=time.time(),
                version=past.version,
                config=config,
                source=source,
                flash=flash,
            )
        )
    return past


def _read(
    reader: Reader,
    checkpoint: int,
    before: Sequence[Start],
    *,
    episodes: int,
    max_attempts: int,
) -> Past:
    steps = reader.steps()
    done = max((row.step for row in steps), default=0)
    batches = reader.whole_batches(checkpoint)
    alpha = next((row.alpha for row in reversed(steps) if row.alpha is not None), None)
    return Past(
        start=len(before) + 1,
        checkpoint=checkpoint,
        before=before,
        redo=[version for version in batches if version < done],
        restored=Restored(
            groups=reader.open_groups(episodes=episodes, max_attempts=max_attempts),
            batches=[
                part for version in batches if version >= done for part in reader.batch(version)
            ],
            first_ids=reader.first_ids(),
        ),
        again=reader.to_begin_anew(),
        dispatched=reader.dispatched(),
        alpha=alpha and msgspec.convert(alpha, AlphaState),
        steps=[row.metrics for row in steps],
        first_numbers=reader.first_numbers(),
    )


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


def _why_anew(store: Store, source: str, settings_changed: bool) -> str:
    """The reason that groups on their way end for; empty if they go on."""
    with store.transaction() as connection:
        before = Reader(connection, store.run).starts()
    if before and (changed := changed_source(before[-1].source, source)):
        logger.warning("tasks are other ones than before, and groups begin anew: %s", changed)
        return SOURCE_CHANGED
    return SETTINGS_CHANGED if settings_changed else ""


def _mend(store: Store, checkpoint: int, drop_open: str) -> None:
    """Takes back what can't be gone on with.

    Parts of a batch whose last part never came. All from the first batch on that can't be trained
    again, because the log has its samples no longer: what was sampled by weights that will never
    be again must not be taken for what those of the same number will sample.
    """
    run = store.run
    with store.transaction() as connection:
        reader = Reader(connection, run)
        whole = reader.whole_batches(0)
        known = whole[-1] + 1 if whole else 0
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
        for table, number in ((BATCHES, "version"), (SAMPLES, "version"), (STEPS, "step")):
            first = reached + (table is STEPS)  # the step that makes version v is step v
            connection.execute(delete(table).where(table.c.run == run, table.c[number] >= first))
        _give_up(connection, run, reader.groups_beyond(reached), ABANDONED)
        if drop_open:
            _give_up(connection, run, reader.open_group_ids(), drop_open)


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
