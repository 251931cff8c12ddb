"""The log between a loop and its disk, under virtual time: what counts when, and what waits."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest

from flash.errors import LogFailure
from flash.fakes import FakeCrew, FakeWorker
from flash.hub.hub import InferenceHub
from flash.hub.reports import PublishReport
from flash.log.log import Log
from flash.log.schema import BATCHES, EPISODES, GROUPS, PUBLISHES, SAMPLES, SEQUENCES
from flash.log.store import Change, StoreError
from flash.rollout.episode import Episode
from flash.rollout.loop import RolloutLoop
from flash.rollout.observer import Observer
from flash.rollout.record import EpisodeRecord
from flash.types import Task
from flash.virtual_time import in_virtual_time
from tests.rollout.test_crew import played
from tests.steady import weights


class Disk:
    """Takes each commit after some seconds, as long as nothing ails it."""

    def __init__(self) -> None:
        self.commits: list[Sequence[Change]] = []
        self.seconds = 0.0
        self.ails = ""

    async def commit(self, changes: Sequence[Change]) -> None:
        await asyncio.sleep(self.seconds)
        if self.ails:
            raise StoreError(self.ails)
        self.commits.append(changes)

    def rows(self, table: object, **values: object) -> list[Change]:
        """What is on it, of a table, with these values among others."""
        changes = [change for commit in self.commits for change in commit]
        return [c for c in changes if c.table is table and values.items() <= c.values.items()]


class Hasty(Observer):
    """Has the log write whenever an episode ends."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        self._log.after_commit(lambda: None)


@contextlib.asynccontextmanager
async def logged(
    disk: Disk, *, alpha: float = 1, batch_size: int = 4
) -> AsyncIterator[tuple[RolloutLoop, FakeCrew]]:
    """Groups of two; each episode takes a second."""
    log = Log(disk.commit, start=1, now=lambda: 0.0, max_lag_s=10, timeout_s=60)
    async with InferenceHub([FakeWorker("w")]) as hub, log:
        crew = FakeCrew(hub, lambda episode: played(hub.version))
        async with RolloutLoop(
            hub, crew=crew, tasks=map(Task, range(10**6)), batch_size=batch_size, group_size=2,
            alpha=alpha, observers=[log, Hasty(log)], log=log,
        ) as loop:  # fmt: skip
            log.fail_with(loop.fail)
            yield loop, crew


def publish(version: int) -> PublishReport:
    return PublishReport(
        version=version, gap=None, paused_s=0.0, load_s=0.0, reset_s=0.0, workers=1, per_worker=()
    )


@in_virtual_time
async def test_no_episode_is_ready_that_is_not_on_disk_and_no_batch_handed_over():
    disk = Disk()
    disk.seconds = 5.0
    async with logged(disk) as (loop, _):
        batch = await loop.next_batch()
        episodes = {sample.episode for sample in batch.samples}
        on_disk = {change.values["episode"] for change in disk.rows(SEQUENCES)}
        assert episodes <= on_disk
        assert len(disk.rows(BATCHES, version=0)) == 1
        assert len(disk.rows(SAMPLES, version=0)) == len(batch.samples)
        # Begun, played, and handed over: three commits, one after another.
        assert asyncio.get_running_loop().time() == pytest.approx(15, abs=0.1)


@in_virtual_time
async def test_what_nobody_waits_for_gathers_and_what_somebody_waits_for_is_written_at_once():
    disk = Disk()
    clock = asyncio.get_running_loop().time
    log = Log(disk.commit, start=1, now=lambda: 0.0, max_lag_s=10, timeout_s=60)
    async with log:
        for version in range(100):
            log.published(publish(version))
            await asyncio.sleep(0.002)
        assert 10 <= len(disk.commits) <= 25
        began_s = clock()
        log.published(publish(100))
        await log.committed()
        assert clock() == began_s
    assert len(disk.rows(PUBLISHES)) == 101


@pytest.mark.parametrize(("seconds", "batch_size"), [(0.3, 4), (0.0, 4), (0.0, 1000)])
@in_virtual_time
async def test_a_batch_its_samples_outcomes_and_groups_are_in_one_commit(seconds, batch_size):
    disk = Disk()
    disk.seconds = seconds
    async with logged(disk, batch_size=batch_size) as (loop, _):
        for version in range(1, 4):
            await loop.next_batch()
            await loop.publish(weights(version))
    for version in range(3):
        (commit,) = [
            commit
            for commit in disk.commits
            if any(c.table is BATCHES and c.values["version"] == version for c in commit)
        ]
        tables = [
            change.table
            for change in commit
            if version in (change.values.get("version"), change.values.get("trained_at_version"))
        ]
        assert (tables.count(SAMPLES), tables.count(EPISODES)) == (batch_size, batch_size)
        trained = [c for c in commit if c.table is GROUPS and c.values.get("outcome") == "trained"]
        assert len(trained) == batch_size // 2


def begun_rows(disk: Disk) -> set[object]:
    return {change.values["episode"] for change in disk.rows(EPISODES) if change.verb == "insert"}


@pytest.mark.parametrize(
    ("seconds", "ails", "said"),
    [(30.0, "", "is not on it"), (0.0, "database or disk is full", "disk is full")],
)
@in_virtual_time
async def test_nothing_begins_while_the_disk_is_slow_or_fails_and_all_goes_on_then(
    seconds: float, ails: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk()
    async with logged(disk) as (loop, crew), asyncio.TaskGroup() as tasks:
        await loop.next_batch()
        await loop.publish(weights(1))
        await asyncio.sleep(5)  # all that there is room for is ready
        disk.seconds, disk.ails = seconds, ails
        asking = tasks.create_task(loop.next_batch())
        await asyncio.sleep(15)
        begun = len(crew.begun)
        assert said in loop.admission_state().log
        await loop.publish(weights(2))  # now there is room
        await asyncio.sleep(5)
        assert len(crew.begun) == begun
        assert not asking.done()
        disk.seconds, disk.ails = 0.0, ""
        await asking
        await asyncio.sleep(1)
        assert loop.admission_state().log == ""
        assert len(crew.begun) > begun
    assert begun_rows(disk) == {episode.id for episode in crew.begun}, "no row was lost"
    assert caplog.text.count("can't be written: database or disk is full") == bool(ails)


@in_virtual_time
async def test_a_disk_that_stays_full_ends_the_run_by_name_after_its_time():
    disk = Disk()
    disk.ails = "database or disk is full"
    with pytest.raises(LogFailure, match=r"for 60 s \(log.timeout_s\): database or disk is full"):
        async with logged(disk) as (loop, _):
            await loop.next_batch()
    assert asyncio.get_running_loop().time() == pytest.approx(60, abs=1)
    assert disk.commits == []


@in_virtual_time
async def test_whatever_the_writer_raises_is_heard_by_what_waits_for_a_commit():
    async def commit(changes: Sequence[Change]) -> None:
        raise ZeroDivisionError

    disk = Disk()
    disk.commit = commit
    with pytest.raises(LogFailure, match="ZeroDivisionError"):
        async with logged(disk) as (loop, _):
            await loop.next_batch()


@in_virtual_time
async def test_what_is_told_before_the_log_is_left_is_on_disk_and_a_shutdown_is_no_outcome():
    disk = Disk()
    disk.seconds = 1.0
    async with logged(disk) as (loop, crew):
        await loop.next_batch()
    assert len(disk.rows(EPISODES)) >= len(crew.begun)
    outcomes = {change.values.get("outcome") for change in disk.rows(EPISODES)}
    assert outcomes == {None, "trained"}
    assert not disk.rows(GROUPS, outcome="dropped")


@in_virtual_time
async def test_a_batch_whose_commit_fails_is_not_handed_over():
    disk = Disk()
    with pytest.raises(LogFailure, match="input/output error"):
        async with logged(disk) as (loop, _):
            await asyncio.sleep(5)  # a batch is ready
            disk.ails = "input/output error"
            await loop.next_batch()


@in_virtual_time
async def test_what_is_told_in_the_moment_the_log_is_left_is_on_disk():
    disk = Disk()
    async with Log(disk.commit, start=1, now=lambda: 0.0, max_lag_s=10, timeout_s=60) as log:
        log.given_up(3, "stale")
    assert disk.rows(GROUPS, group=3, reason="stale")


@in_virtual_time
async def test_a_call_that_is_given_up_during_the_commit_loses_no_batch():
    disk = Disk()
    async with logged(disk) as (loop, _):
        await asyncio.sleep(5)  # a batch is ready
        disk.seconds = 5.0
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await loop.next_batch()
        assert [(await loop.next_batch()).version for _ in range(2)] == [0, 1]
    assert len(disk.rows(BATCHES)) == 2


@in_virtual_time
async def test_a_run_that_has_done_all_hears_that_the_end_of_it_is_not_on_disk():
    disk = Disk()
    with pytest.raises(LogFailure, match="disk is full"):
        async with logged(disk) as (loop, _):
            await loop.next_batch()
            disk.ails = "database or disk is full"
            await loop.publish(weights(1))


@in_virtual_time
async def test_a_run_that_fails_fails_with_its_own_cause_whatever_the_log_says():
    disk = Disk()
    with pytest.raises(ZeroDivisionError):
        async with logged(disk) as (loop, _):
            await loop.next_batch()
            disk.ails = "database or disk is full"
            await loop.publish(weights(1))
            raise ZeroDivisionError
