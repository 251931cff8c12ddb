"""What of a run's log may go, a bite at a time (`log.keep`); every call blocks.

    a pass ─┬─► episodes that were never trained, oldest first
            ├─► batches that no resume can need, oldest first
            └─► free pages, back to the disk

What goes of an episode are its tokens, texts and states. Its row stays, and those of its samples:
what is counted adds up, and a batch whose tokens are gone is known as one.
"""

import functools
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from sqlalchemy import Row, Select, Table, func, select

from flash.log.config import TRAINED, bytes_of
from flash.log.schema import COMPLETIONS, EPISODES, GROUPS, OBSERVATIONS, SAMPLES, SEQUENCES
from flash.log.store import Change, Store

logger = logging.getLogger(__name__)

_EPISODES = 128  # that a bite looks at
_TOKENS = 500_000  # of episodes in a bite, but for a last one: 3 MB or so, some 20 ms
_FREE_PAGES = 256  # that a bite gives back: 1 MB
# Of the file. What is free is written to again, and need not grow it; SQLite moves a page for each
# that it gives back.
_FREE_SHARE = 1 / 16
_SLICE = 4096  # episodes that are measured at a time
_BULKY = (OBSERVATIONS, COMPLETIONS, SEQUENCES)

_EPISODE = (
    EPISODES.c.episode,
    EPISODES.c.outcome,
    (
        func.coalesce(EPISODES.c.prompt_tokens, 0) + func.coalesce(EPISODES.c.generated_tokens, 0)
    ).label("tokens"),
    EPISODES.c.turn_states.is_not(None).label("has_states"),
)


def first_needed(checkpoints: Sequence[int], *, reach: int) -> int:
    """The first version whose batch may be of use still.

    Args:
        checkpoints: the versions of those that are whole.
        reach: how many versions old a token may be that is trained.

    A resume redoes from the newest, or the one before if that is damaged, or else from the first
    model.
    """
    fallback = sorted(checkpoints)[-2] if len(checkpoints) > 1 else 0
    return max(0, fallback - reach)


class Keeping:
    """Says what goes next of one run's log.

    Args:
        keep: as in `flash.log.config`; not "all".
        needed_from: see `first_needed`; asked once a pass.
    """

    def __init__(self, store: Store, keep: str, *, needed_from: Callable[[], int]) -> None:
        self._store = store
        self._keep = keep
        self._most_bytes = None if keep == TRAINED else bytes_of(keep)
        self._needed_from = needed_from
        self._pass: Iterator[Sequence[Change]] | None = None
        self._settled = -1  # episodes up to that were trained, or are gone
        self._batches_gone = 0  # those before that version
        self._slices: dict[int, int] = {}  # the bytes of some episodes, where pages don't tell
        self._measured = 0  # slices before that one grow no more
        self._told = False

    def bite(self) -> Sequence[Change] | None:
        """What is to be deleted next, perhaps nothing; None when a pass is over.

        It must be committed before the next call, which is of the same pass or of a new one.
        """
        if self._pass is None:
            self._pass = self._one_pass()
        try:
            changes = next(self._pass, None)
        except BaseException:
            self._pass, self._measured = None, 0
            raise
        if changes is None:
            self._pass = None
        return changes

    def _one_pass(self) -> Iterator[Sequence[Change]]:
        if self._most_bytes is None:
            yield from self._never_trained()
        else:
            yield from self._measure()
            yield from self._while_too_large(self._never_trained())
            yield from self._while_too_large(self._trained_before(self._needed_from()))
            self._tell_if_too_large()
        while self._store.give_back(_FREE_PAGES, leave=_FREE_SHARE):
            yield ()

    def _while_too_large(self, bites: Iterator[Sequence[Change]]) -> Iterator[Sequence[Change]]:
        while self._is_too_large() and (bite := next(bites, None)) is not None:
            yield bite
            for part in {change.values.get("episode", -1) // _SLICE for change in bite}:
                self._measure_slice(part)

    # ── what goes ────────────────────────────────────────────────────────────────────────────

    def _never_trained(self) -> Iterator[Sequence[Change]]:
        """Of groups that have ended: of others a resume may need what was said in an episode."""
        after, all_settled = self._settled, True
        of_group = (GROUPS.c.run == EPISODES.c.run) & (GROUPS.c.group == EPISODES.c.group)
        query = select(*_EPISODE, GROUPS.c.outcome.label("of_group")).join(GROUPS, of_group)
        query = query.order_by(EPISODES.c.episode).limit(_EPISODES)
        while rows := self._rows(query.where(EPISODES.c.episode > after)):
            going: list[Row[Any]] = []
            for row in rows:
                if row.outcome is None or (row.outcome != "trained" and row.of_group is None):
                    all_settled = False
                elif row.outcome != "trained":
                    going.append(row)
                after = row.episode
                if all_settled:
                    self._settled = after
                if sum(row.tokens for row in going) > _TOKENS:
                    break
            yield _of_episodes(going)

    def _trained_before(self, version: int) -> Iterator[Sequence[Change]]:
        """Batches before that version, but for episodes that are in a later one too."""
        samples = select(SAMPLES.c.episode).where(SAMPLES.c.run == self._store.run)
        later = samples.where(SAMPLES.c.version >= version)
        while self._batches_gone < version:
            of_batch = samples.where(SAMPLES.c.version == self._batches_gone)
            query = select(*_EPISODE).order_by(EPISODES.c.episode)
            query = query.where(EPISODES.c.episode.in_(of_batch), EPISODES.c.episode.not_in(later))
            for going in _in_bites(self._rows(query)):
                yield _of_episodes(going)
            # One number or one for each token; without its tokens none is of use.
            gone = {"version": self._batches_gone, "advantage": np.zeros(0)}
            self._batches_gone += 1
            yield [Change("update", SAMPLES, gone)]

    def _rows(self, query: Select[Any]) -> Sequence[Row[Any]]:
        with self._store.transaction() as connection:
            return connection.execute(query.where(EPISODES.c.run == self._store.run)).all()

    # ── how much there is ────────────────────────────────────────────────────────────────────

    def _is_too_large(self) -> bool:
        return self._most_bytes is not None and self._bytes() > (1 - _FREE_SHARE) * self._most_bytes

    def _bytes(self) -> int:
        pages = self._store.bytes_in_pages()
        return sum(self._slices.values()) if pages is None else pages

    def _measure(self) -> Iterator[Sequence[Change]]:
        """Where pages don't tell: what rows take, in slices, but for those that grow no more."""
        if self._store.bytes_in_pages() is not None:
            return
        of_run = EPISODES.c.run == self._store.run
        with self._store.transaction() as connection:
            last = connection.scalar(select(func.max(EPISODES.c.episode)).where(of_run))
            oldest = select(func.min(EPISODES.c.episode))
            open_from = connection.scalar(oldest.where(of_run, EPISODES.c.outcome.is_(None)))
        for part in range(self._measured, 0 if last is None else last // _SLICE + 1):
            self._measure_slice(part)
            yield ()
        self._measured = (open_from if open_from is not None else last or 0) // _SLICE

    def _measure_slice(self, part: int) -> None:
        if part < 0 or self._store.bytes_in_pages() is not None:
            return
        with self._store.transaction() as connection:
            self._slices[part] = sum(
                connection.scalar(_bytes_of(table, self._store.run, part)) or 0 for table in _BULKY
            )

    def _tell_if_too_large(self) -> None:
        if self._told or not self._is_too_large():
            return
        self._told = True
        logger.warning(
            "log.keep=%s: the log takes %.1f MB, and a resume may need all that is left: make "
            "checkpoints more often (checkpoint.every, checkpoint.minutes), or give it more room",
            self._keep, self._bytes() / 1e6,
        )  # fmt: skip


def _in_bites(rows: Sequence[Row[Any]]) -> Iterator[list[Row[Any]]]:
    bite: list[Row[Any]] = []
    for row in rows:
        bite.append(row)
        if len(bite) == _EPISODES or sum(row.tokens for row in bite) > _TOKENS:
            yield bite
            bite = []
    if bite:
        yield bite


def _of_episodes(rows: Iterable[Row[Any]]) -> list[Change]:
    """All but their own rows."""
    changes: list[Change] = []
    for row in rows:
        changes += [Change("delete", table, {"episode": row.episode}) for table in _BULKY]
        if row.has_states:
            changes.append(
                Change("update", EPISODES, {"episode": row.episode, "turn_states": None})
            )
    return changes


def _bytes_of(table: Table, run: int, part: int) -> Select[Any]:
    """What PostgreSQL has in these episodes' columns, as they are compressed."""
    sizes = [func.coalesce(func.pg_column_size(column), 0) for column in table.columns]
    total = functools.reduce(operator.add, sizes)
    in_part = table.c.episode.between(part * _SLICE, (part + 1) * _SLICE - 1)
    return select(func.sum(total)).where(table.c.run == run, in_part)
