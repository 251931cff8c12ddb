"""What may be trained again, over a kill: the same groups as if the run had gone on."""

import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select

from flash import virtual_time
from flash.config import load
from flash.fakes import FakeCrew, FakeWorker
from flash.hub.hub import InferenceHub
from flash.log.log import Log
from flash.log.past import Past, take_over
from flash.log.schema import EPISODES, SEQUENCES
from flash.log.store import Change, Store, sqlite_url
from flash.rollout.episode import Episode
from flash.rollout.loop import RolloutLoop
from flash.types import Batch
from flash.virtual_time import in_virtual_time
from tests.rollout.test_crew import played
from tests.steady import now, weights


class Run:
    """Four groups of two in a batch; two groups come to their ends every ten seconds."""

    def __init__(self, folder: Path) -> None:
        self._url = sqlite_url(folder)
        self._killed = False
        self.store: Store | None = None

    def take_over(self, *, resume: bool = True, **changes: Any) -> Past:
        if self.store is not None:
            self.store.close()
        self.store = Store(self._url, run="a" * 32, name="run")
        self.config = load(
            "frozen_lake",
            {"group_size": 2, "batch_size": 8, "alpha": 2, "rollout.reuse.uses": 3, **changes},
        )
        return take_over(self.store, checkpoint=0 if resume else None, config=self.config)

    async def _commit(self, changes: Sequence[Change]) -> None:
        assert self.store is not None
        if not self._killed:
            self.store.commit(changes)

    def kill(self) -> None:
        """Nothing that happens from now on is on the disk."""
        self._killed = True

    @contextlib.asynccontextmanager
    async def going_on(self, past: Past) -> AsyncIterator[RolloutLoop]:
        self._killed = False
        self.log = Log(
            self._commit, start=past.start, first_numbers=past.first_numbers,
            known_version=past.logged_version,
            open_groups=[group.group for group in past.restored.groups],
            now=lambda: 0.0, max_lag_s=10, timeout_s=60,
        )  # fmt: skip
        async with InferenceHub([FakeWorker("w")]) as hub, self.log:
            if past.version:
                await hub.publish(weights(past.version))
            crew = FakeCrew(hub, lambda episode: _play(hub, episode), seconds=_seconds)
            async with RolloutLoop(
                hub, crew=crew, tasks=past.tasks(0),
                batch_size=8, group_size=2, alpha=2, settings=self.config.rollout,
                restored=past.restored, observers=[self.log], log=self.log,
            ) as loop:  # fmt: skip
                yield loop

    async def step(self, loop: RolloutLoop, batch: Batch) -> None:
        await loop.publish(weights(batch.version + 1))
        self.log.measured({"step": batch.version + 1})
        await self.log.committed()


def _play(hub: InferenceHub, episode: Episode) -> Any:
    return played(hub.version, reward=float(episode.group % 5))


def _seconds(episode: Episode) -> float:
    return max(1.0, 10.0 * (episode.group // 2 + 1) - now())


def told(batch: Batch) -> list[tuple[int, float, list[int]]]:
    """All but the ids of episodes, of which those that ran at a kill get others."""
    return [
        (sample.group, sample.reward, sample.sampled_versions().tolist())
        for sample in batch.samples
    ]


async def batches_of(run: Run, past: Past, most: int, *, last_is_stepped: bool = True) -> list[Any]:
    """The next ones, of which all are trained, or all but the last; then the run is killed."""
    batches = []
    async with run.going_on(past) as loop:
        while len(batches) < most:
            batches.append(batch := await loop.next_batch())
            if last_is_stepped or len(batches) < most:
                await run.step(loop, batch)
        run.kill()
    return [told(batch) for batch in batches]


async def killed(folder: Path, after: int, *, last_is_stepped: bool) -> list[Any]:
    run = Run(folder)
    begun = run.take_over(resume=False)
    batches = await batches_of(run, begun, after, last_is_stepped=last_is_stepped)
    past = run.take_over()
    done = batches[: past.version]
    return done + await batches_of(run, past, 8 - len(done))


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize("after", [1, 3])
def test_the_next_batches_are_those_of_a_run_that_was_not_killed(tmp_path, after, stepped):
    (tmp_path / "whole").mkdir()
    run = Run(tmp_path / "whole")
    whole = virtual_time.run(batches_of(run, run.take_over(resume=False), 8))
    groups = [{group for group, *_ in batch} for batch in whole]
    assert sum(map(len, groups)) - len(set.union(*groups)) > 8, "many are trained again"
    assert virtual_time.run(killed(tmp_path, after, last_is_stepped=stepped)) == whole


@in_virtual_time
async def test_a_use_in_an_abandoned_future_does_not_count(tmp_path):
    run = Run(tmp_path)
    batches = await batches_of(run, run.take_over(resume=False), 3)
    groups = [{group for group, *_ in batch} for batch in batches]
    before = Counter(itertools.chain(*groups[:2]))
    assert groups[2] & before.keys(), "some of the third were trained before"
    with run.store.transaction() as connection:
        lost = select(EPISODES.c.episode).where(EPISODES.c.group.in_(groups[2] - set(before)))
        connection.execute(delete(SEQUENCES).where(SEQUENCES.c.episode.in_(lost)))
    past = run.take_over()
    assert past.logged_version == 2
    assert {group.group: group.uses for group in past.restored.reusable} == before


@in_virtual_time
async def test_what_began_under_other_settings_of_a_group_is_not_trained_again(tmp_path):
    run = Run(tmp_path)
    await batches_of(run, run.take_over(resume=False), 1)
    known = [group.group for group in run.take_over().restored.reusable]
    assert known == [0, 1, 2, 3]
    off = run.take_over(**{"rollout.reuse.uses": 1})
    assert not off.restored.reusable
    changed = {"agent.max_turns": 3} | {"reward": {"name": "process", "run": "math:floor"}}
    assert not run.take_over(**changed).restored.reusable
    assert not run.take_over(**changed).restored.reusable, "nor at the next resume"
