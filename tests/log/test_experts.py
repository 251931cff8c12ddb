"""The experts of tokens in the log: what was trained, and what a crash cut off."""

import asyncio
import itertools
from collections.abc import Sequence

from flash.agents import EnvironmentAgent
from flash.config import load
from flash.fakes import FakeEnvs, FakeStyle, FakeWorker
from flash.hub.hub import InferenceHub
from flash.log.log import Log
from flash.log.past import take_over
from flash.log.reading import Reader
from flash.log.store import Change, Store, sqlite_url
from flash.rollout.history import Sampled
from flash.rollout.loop import RolloutLoop
from flash.types import Task
from flash.virtual_time import in_virtual_time


@in_virtual_time
async def test_a_batch_is_read_with_the_experts_that_it_was_handed_over_with(tmp_path):
    store = Store(sqlite_url(tmp_path), run="a" * 32, name="run")
    config = load("frozen_lake", {"group_size": 2, "batch_size": 4})
    past = take_over(store, checkpoint=0, config=config)

    async def commit(changes: Sequence[Change]) -> None:
        store.commit(changes)

    log = Log(
        commit, start=past.start, first_numbers=past.first_numbers, known_version=0,
        open_groups=[], now=lambda: 0.0, max_lag_s=10, timeout_s=60,
    )  # fmt: skip
    worker = FakeWorker("w", token_s=(1.0, 1.0), tokens=(3, 3), experts=2)
    async with InferenceHub([worker]) as hub, log, RolloutLoop(
        hub,
        agent=lambda: EnvironmentAgent(
            envs=FakeEnvs(turns=(3, 3)), style=FakeStyle(), max_tokens=3, experts=True,
        ),
        tasks=(Task(seed) for seed in itertools.count()), batch_size=4, group_size=2,
        observers=[log], log=log,
    ) as loop:  # fmt: skip
        waiting = asyncio.create_task(loop.next_batch())
        await asyncio.sleep(5)
        await log.committed()
        with store.transaction() as connection:
            reader = Reader(connection, store.run)
            histories = reader.histories([row.episode for row in reader.running()])
        batch = await waiting
        with store.transaction() as connection:
            (again,) = Reader(connection, store.run).batch(0)
    store.close()
    for sample, logged in zip(batch.samples, again.samples, strict=True):
        assert sample.experts[:, 0].tolist() == [*range(sample.num_tokens - 1), -1]
        assert logged.experts.tolist() == sample.experts.tolist()
    said = [step.completion for steps in histories.values() for step in steps
            if isinstance(step, Sampled)]  # fmt: skip
    assert said, "some were in the middle of an episode"
    assert all(completion.experts.shape[1] == 2 for completion in said)
