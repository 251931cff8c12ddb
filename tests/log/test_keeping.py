"""What of a log goes, what never does, and that its file is smaller then."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import func, select

from flash.checkpoints import whole_versions
from flash.config import load
from flash.log.config import LogConfig, bytes_of
from flash.log.keeping import Keeping, first_needed
from flash.log.log import Log
from flash.log.past import take_over
from flash.log.reading import Reader
from flash.log.run_log import ID_FILE, RunLog
from flash.log.schema import (
    BATCHES,
    COMPLETIONS,
    EPISODES,
    GROUPS,
    OBSERVATIONS,
    SAMPLES,
    SEQUENCES,
    STEPS,
)
from flash.log.store import Change, Store, StoreError, sqlite_url
from flash.train import train
from flash.types import Batch
from flash.virtual_time import in_virtual_time
from tests.tiny_runs import tiny

TOKENS = 2000
CONFIG = load("frozen_lake", {"group_size": 2, "batch_size": 2})


class Run:
    """A run of groups of two episodes; each batch is a group, each episode 2,000 tokens."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._rng = np.random.default_rng(0)
        self._changes: list[Change] = []

    def _insert(self, table: Any, **values: Any) -> None:
        self._changes.append(Change("insert", table, values))

    def group(self, number: int, outcome: str | None = None, reason: str = "") -> None:
        self._insert(
            GROUPS, group=number, start=1, seed=number, options={}, begun_at=0.0, outcome=outcome,
            reason=reason,
        )  # fmt: skip

    def episode(
        self,
        number: int,
        group: int,
        outcome: str | None = None,
        reason: str = "",
        *,
        version: int = 0,
        cut_off: bool = False,
    ) -> None:
        """With its tokens; cut off, with what it said until then."""
        played: dict[str, Any] = {} if cut_off else {
            "played_at": 1.0, "reward": 1.0, "success": True, "turns": 1, "prompt_tokens": 0,
            "generated_tokens": TOKENS, "turn_rewards": [1.0], "turn_states": ["x" * 100],
            "version_min": version, "version_max": version,
        }  # fmt: skip
        self._insert(
            EPISODES, episode=number, group=group, attempt=1, start=1, seed=group,
            admitted_at=0.0, outcome=outcome, reason=reason,
            trained_at_version=version if outcome == "trained" else None, **played,
        )  # fmt: skip
        self._insert(
            OBSERVATIONS, episode=number, step=0, at=0.0, text="a room", reward=0.0,
            terminated=False, truncated=False, info={},
        )  # fmt: skip
        arrays = {
            "token_ids": self._rng.integers(0, 2**30, TOKENS),
            "logprobs": -self._rng.random(TOKENS),
            "versions": np.full(TOKENS, version),
        }
        if cut_off:
            self._insert(
                COMPLETIONS, episode=number, step=1, at=0.0, prompt_sum=0, temperature=1.0,
                finish_reason="stop", worker="w", **arrays,
            )  # fmt: skip
            return
        ones = np.ones(TOKENS)
        self._insert(
            SEQUENCES, episode=number, number=0, tokens=TOKENS, sampled=TOKENS, loss_mask=ones,
            temperatures=ones, turns=np.zeros(TOKENS), **arrays,
        )  # fmt: skip

    def batch(self, version: int, episodes: Sequence[int]) -> None:
        self._insert(BATCHES, version=version, part=0, start=1, at=0.0, last=True, metrics={})
        for position, episode in enumerate(episodes):
            self._insert(
                SAMPLES, version=version, part=0, position=position, episode=episode, number=0,
                group=version, advantage=np.full(TOKENS, 0.5), reward=1.0,
            )  # fmt: skip
        self._insert(STEPS, step=version + 1, start=1, at=0.0, metrics={"step": version + 1})

    def trained(self, version: int) -> None:
        """A batch of a group of its own: episodes 2·version and the next one."""
        self.group(version, "trained")
        for number in (2 * version, 2 * version + 1):
            self.episode(number, version, "trained", version=version)
        self.batch(version, [2 * version, 2 * version + 1])

    def write(self) -> None:
        self.store.commit(self._changes)
        self._changes = []

    def kept(self, *tables: Any) -> set[int]:
        """The episodes that have something in these tables."""
        with self.store.transaction() as connection:
            return {
                number
                for table in tables or (OBSERVATIONS, COMPLETIONS, SEQUENCES)
                for number in connection.scalars(select(table.c.episode))
            }

    def batches(self, first: int) -> list[Batch]:
        with self.store.transaction() as connection:
            reader = Reader(connection, self.store.run)
            return [part for v in reader.whole_batches(first) for part in reader.batch(v)]

    def tidy(self, keep: str, *, needed_from: int = 0) -> int:
        """A pass; returns how many bites it took."""
        keeping = Keeping(self.store, keep, needed_from=lambda: needed_from)
        return sum(1 for _ in bites(keeping, self.store))


def bites(keeping: Keeping, store: Store) -> Iterator[Sequence[Change]]:
    while (bite := keeping.bite()) is not None:
        store.commit(bite)
        yield bite


@pytest.fixture
def run(store):
    return Run(store)


def test_of_episodes_that_were_never_trained_the_tokens_go_and_how_they_ended_stays(run):
    run.trained(0)
    run.group(1, "dropped", "stale")
    run.episode(2, 1, "dropped", "stale")
    run.episode(3, 1, "cancelled", "interrupted", cut_off=True)
    run.group(2)  # on its way
    run.episode(4, 2)
    run.episode(5, 2, cut_off=True)
    run.episode(6, 2, "cancelled", "interrupted", cut_off=True)
    run.episode(7, 2, "failed", "env", cut_off=True)
    run.write()
    run.tidy("trained")
    assert run.kept() == {0, 1, 4, 5, 6, 7}
    with run.store.transaction() as connection:
        rows = connection.execute(select(EPISODES).order_by(EPISODES.c.episode)).all()
        assert connection.scalar(select(func.count()).select_from(SAMPLES)) == 2
    assert [(row.outcome, row.reward) for row in rows[:4]] == [
        ("trained", 1.0), ("trained", 1.0), ("dropped", 1.0), ("cancelled", None),
    ]  # fmt: skip
    assert [row.turn_states is None for row in rows[:3]] == [False, False, True]


def test_what_ends_later_goes_in_a_later_pass(run):
    keeping = Keeping(run.store, "trained", needed_from=lambda: 0)
    run.group(0)
    run.episode(0, 0)
    run.group(1, "dropped", "filtered")
    run.episode(1, 1, "dropped", "filtered")
    run.write()
    list(bites(keeping, run.store))
    assert run.kept() == {0}
    run.store.commit(
        [
            Change("update", GROUPS, {"group": 0, "outcome": "dropped", "reason": "stale"}),
            Change("update", EPISODES, {"episode": 0, "outcome": "dropped", "reason": "stale"}),
        ]
    )
    list(bites(keeping, run.store))
    assert run.kept() == set()


def test_a_log_that_is_small_enough_keeps_all(run):
    run.group(0, "dropped", "stale")
    run.episode(0, 0, "dropped", "stale")
    run.trained(1)
    run.write()
    run.tidy("1 GB", needed_from=2)
    assert run.kept() == {0, 2, 3}


def test_what_was_never_trained_goes_first_then_the_oldest_batches_and_no_more_than_must(run):
    for version in range(60):
        run.trained(version)
    for number in range(100, 110):
        run.group(number, "dropped", "stale")
        run.episode(number + 100, number, "dropped", "stale")
    run.write()
    size = Keeping(run.store, "1 MB", needed_from=lambda: 0)
    list(size._measure())
    used = size._bytes()
    run.tidy(f"{used * 1.01 / (15 / 16) / 1e6:.6f} MB", needed_from=40)
    assert len(run.kept()) == 130, "as large as it may be"
    run.tidy(f"{used * 0.8 / (15 / 16) / 1e6:.6f} MB", needed_from=40)
    kept = run.kept()
    assert not kept & set(range(200, 210))
    assert 80 < len(kept) < 115
    assert kept == set(range(min(kept), 120)), "the oldest went first"


def test_what_a_resume_may_need_stays_however_small_the_log_is_to_be_and_that_is_said_once(
    run, caplog
):
    for version in range(10):
        run.trained(version)
    run.group(20)
    run.episode(40, 20, version=9)
    run.episode(41, 20, version=9, cut_off=True)
    run.write()
    before = run.batches(6)
    keeping = Keeping(run.store, "0.001 MB", needed_from=lambda: 6)
    list(bites(keeping, run.store))
    list(bites(keeping, run.store))
    assert run.kept() == {*range(12, 20), 40, 41}
    assert caplog.text.count("a resume may need all that is left: make checkpoints more often") == 1
    after = run.batches(6)
    assert [batch.version for batch in after] == [6, 7, 8, 9]
    for was, now in zip(before, after, strict=True):
        for one, other in zip(was.samples, now.samples, strict=True):
            assert one.logprobs.tobytes() == other.logprobs.tobytes()
            assert one.token_ids.tobytes() == other.token_ids.tobytes()
            assert one.advantage.tobytes() == other.advantage.tobytes()


@pytest.mark.parametrize(("checkpoint", "redone"), [(8, [8, 9]), (6, [6, 7, 8, 9])])
def test_a_resume_redoes_from_the_newest_checkpoint_and_from_the_one_before_it(
    run, checkpoint, redone
):
    for version in range(10):
        run.trained(version)
    run.write()
    run.tidy("0.001 MB", needed_from=first_needed([2, 6, 8], reach=0))
    past = take_over(run.store, checkpoint=checkpoint, config=CONFIG)
    assert (past.redo, past.version) == (redone, 10)
    assert len(past.records) == 20, "what is gone is counted still"


def test_a_resume_from_an_older_checkpoint_does_the_steps_anew_and_says_so(run, caplog):
    for version in range(10):
        run.trained(version)
    run.write()
    run.tidy("0.001 MB", needed_from=first_needed([2, 6, 8], reach=0))
    past = take_over(run.store, checkpoint=2, config=CONFIG)
    assert (past.redo, past.version) == ([], 2)
    assert "the samples of version 2 no longer: the steps from 3 to 10 are done anew" in caplog.text
    assert past.again == {"": list(range(2, 10))}, "their tasks begin anew"


async def test_what_is_redone_ends_before_a_batch_that_has_gone(run, tmp_path):
    """For a trainer that begins at the first model because no checkpoint is whole."""
    for version in range(4):
        run.trained(version)
    run.write()
    (tmp_path / ID_FILE).write_text("a" * 32)
    async with RunLog(tmp_path, CONFIG.log, store=lambda *args, **named: run.store) as log:
        found = [last.version async for *_, last in log.batches(0)]
        assert found == [0, 1, 2, 3]
        run.tidy("0.001 MB", needed_from=2)
        assert [last.version async for *_, last in log.batches(0)] == []
        assert [last.version async for *_, last in log.batches(2)] == [2, 3]


def test_an_episode_that_a_needed_batch_has_too_stays(run):
    for version in range(4):
        run.trained(version)
    run.batch(4, [0, 1, 7])
    run.write()
    run.tidy("0.001 MB", needed_from=4)
    assert run.kept() == {0, 1, 7}
    with run.store.transaction() as connection:
        reader = Reader(connection, run.store.run)
        # Of version 0 the tokens are there still, by another batch, and the advantages are not.
        assert [reader.has_samples(v) for v in range(5)] == [False, False, False, False, True]


@pytest.mark.parametrize(
    ("checkpoints", "reach", "first"),
    [
        ([], 0, 0),
        ([8], 0, 0),  # were it damaged, all would be trained again
        ([6, 8], 0, 6),
        ([8, 2, 6], 2, 4),
        ([1, 8], 4, 0),
    ],
)
def test_needed_is_what_the_checkpoint_before_the_newest_redoes_and_what_alpha_reaches(
    checkpoints, reach, first
):
    assert first_needed(checkpoints, reach=reach) == first


def test_a_checkpoint_that_is_not_whole_counts_for_nothing(tmp_path):
    for version in (3, 5):
        folder = tmp_path / "checkpoints" / f"step_{version:06d}"
        folder.mkdir(parents=True)
        (folder / "trainer.json").write_text(f'{{"policy_version": {version}, "files": {{}}}}')
    (tmp_path / "checkpoints" / "step_000007").mkdir()
    assert whole_versions(tmp_path) == [3, 5]


@pytest.mark.parametrize("is_read", [False, True])
def test_the_file_of_sqlite_is_smaller_then(tmp_path, is_read):
    store = Store(sqlite_url(tmp_path), run="a" * 32, name="run")
    store.own()
    run = Run(store)
    for number in range(200):
        run.group(number, "dropped", "stale")
        run.episode(number, number, "dropped", "stale")
    run.trained(300)
    run.write()
    store.close()  # all of it is in the file then
    before = (tmp_path / "log.sqlite").stat().st_size
    if is_read:
        other = Store(sqlite_url(tmp_path), run="a" * 32, name="run")
        with other.transaction() as connection:
            connection.execute(select(func.count()).select_from(EPISODES)).all()
            run.tidy("trained")
            assert connection.scalar(select(func.count()).select_from(SEQUENCES)) == 202
        other.close()
    run.tidy("trained")
    after = (tmp_path / "log.sqlite").stat().st_size
    assert before > 3e6
    assert after < before / 10
    assert run.kept() == {600, 601}
    store.close()


# ── beside the commits ───────────────────────────────────────────────────────────────────────


class Slow:
    """A store on which all takes a second."""

    def __init__(self, bites: int) -> None:
        self.order: list[str] = []
        self._left = bites
        self.ails = ""

    async def commit(self, changes: Sequence[Change]) -> None:
        await asyncio.sleep(1)
        if self.ails:
            raise StoreError(self.ails)
        self.order.append("bite" if changes[0].verb == "delete" else "commit")

    async def tidy(self) -> Sequence[Change] | None:
        if not self._left:
            return None
        self._left -= 1
        return [Change("delete", OBSERVATIONS, {"episode": 1})]


def log_of(store: Slow) -> Log:
    return Log(store.commit, tidy=store.tidy, start=1, now=lambda: 0.0, max_lag_s=10, timeout_s=60)


@in_virtual_time
async def test_between_two_bites_all_that_happened_meanwhile_is_committed():
    store = Slow(bites=4)
    async with log_of(store) as log:
        for number in range(3):
            log.measured({"step": number})
            await log.committed()
            assert asyncio.get_running_loop().time() <= 2 * number + 1
    assert store.order == ["commit", "bite", "commit", "bite", "commit", "bite", "bite"]


@in_virtual_time
async def test_a_bite_that_can_not_be_written_is_tried_until_it_is_before_any_other(caplog):
    store = Slow(bites=1)
    async with log_of(store) as log:
        log.measured({"step": 0})
        await log.committed()
        store.ails = "disk is full"
        await asyncio.sleep(5)
        log.measured({"step": 1})
        store.ails = ""
        await log.committed()
    assert store.order == ["commit", "bite", "commit"]


@in_virtual_time
async def test_a_checkpoint_makes_room_and_the_end_waits_so_long_only():
    store = Slow(bites=0)
    async with log_of(store) as log:
        log.measured({"step": 0})
        await log.committed()
        store._left = 1000
        log.measured({"step": 1})
        await log.committed()
        assert store.order == ["commit", "commit"]
        log.saved(Path("step_000001"))
        await log.committed()
    assert store.order.count("bite") == 10
    assert asyncio.get_running_loop().time() == pytest.approx(13)


# ── log.keep ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("size", "bytes_"),
    [("20 GB", 20e9), ("500MB", 500e6), ("1.5 tb", 1.5e12), ("0.001 MB", 1000)],
)
def test_a_size_is_a_number_with_its_unit(size, bytes_):
    assert bytes_of(size) == bytes_
    assert LogConfig(keep=size).keep == size


@pytest.mark.parametrize(
    "keep",
    ["", "none", "20", "20 G", "-1 GB", "0 GB", "1e3 GB", "GB", "20 GB more", 20, True, None],
)
def test_what_is_no_size_is_refused(keep):
    with pytest.raises(ValueError, match="must be all, trained, or a size with its unit"):
        LogConfig(keep=keep)


# ── a whole run ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
async def test_a_run_that_keeps_next_to_nothing_goes_on_from_either_checkpoint(tmp_path, caplog):
    def config(**changes):
        little = {"log.keep": "0.001 MB", "checkpoint.every": 1, "eval_every": 100}
        return tiny("frozen_lake", tmp_path, name="run", **little, **changes)

    await train(config(steps=4), stop=asyncio.Event())
    store = Store(sqlite_url(tmp_path / "run"), run=(tmp_path / "run/log.id").read_text(), name="")
    with store.transaction() as connection:
        reader = Reader(connection, store.run)
        assert [reader.has_samples(version) for version in range(4)] == [False, False, True, True]
    (tmp_path / "run/checkpoints/step_000004/trainer.json").unlink()  # α=1: version 2 is of use
    await train(config(steps=6, **{"checkpoint.resume": True}), stop=asyncio.Event())
    assert "no longer" not in caplog.text
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    assert steps[-6:] == [1, 2, 3, 4, 5, 6]
    with store.transaction() as connection:
        trained = connection.scalar(
            select(func.count()).where(EPISODES.c.outcome == "trained", EPISODES.c.reward >= 0)
        )
    assert trained == 6 * 16, "each is counted still"
    store.close()
