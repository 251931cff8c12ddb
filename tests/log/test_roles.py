"""Episodes that several played, in the log: who said what, and what that was worth."""

import asyncio
import itertools
from collections.abc import Sequence

from flash.agents.actor import Actor
from flash.config import load
from flash.conversation import TokenSequence
from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub
from flash.log.log import Log
from flash.log.past import Past, take_over
from flash.log.reading import Reader
from flash.log.store import Change, Store, sqlite_url
from flash.rollout.loop import RolloutLoop
from flash.types import SamplingParams, Task, Trajectory
from flash.virtual_time import in_virtual_time


class Pair(Actor):
    """One asks, one answers, whose reward is the task's seed."""

    async def play(self, episode):
        sequences = []
        for turn, role in enumerate(("asks", "answers")):
            sequence = TokenSequence([turn + 1], role=role)
            said = await episode.generate([turn + 1], SamplingParams(max_tokens=3))
            sequence.add_sampled(said, turn=turn)
            sequences.append(sequence.snapshot())
        rewards = {"answers": float(episode.task.seed)}
        return Trajectory(sequences=sequences, reward=0.5, turns=2, role_rewards=rewards)


def taken_over(store: Store) -> Past:
    config = load("frozen_lake", {"group_size": 2, "batch_size": 4})
    return take_over(store, checkpoint=0, config=config)


@in_virtual_time
async def test_who_said_what_and_what_it_was_worth_is_read_again(tmp_path):
    store = Store(sqlite_url(tmp_path), run="a" * 32, name="run")
    past = taken_over(store)

    async def commit(changes: Sequence[Change]) -> None:
        store.commit(changes)

    log = Log(
        commit, start=past.start, first_numbers=past.first_numbers, known_version=0,
        open_groups=[], now=lambda: 0.0, max_lag_s=10, timeout_s=60,
    )  # fmt: skip
    worker = FakeWorker("w", token_s=(1.0, 1.0), tokens=(3, 3))
    async with InferenceHub([worker]) as hub, log, RolloutLoop(
        hub, agent=lambda: Pair(episode_timeout_s=100),
        tasks=(Task(seed) for seed in itertools.count()), batch_size=4, group_size=2, alpha=1,
        observers=[log], log=log,
    ) as loop:  # fmt: skip
        batch = await loop.next_batch()
        await asyncio.sleep(50)  # others end, and wait for their batch
        await log.committed()
    with store.transaction() as connection:
        (again,) = Reader(connection, store.run).batch(0)
    left = [ready for group in taken_over(store).restored.groups for ready in group.ready]
    store.close()

    told = [(s.episode, s.role, s.reward, s.advantage) for s in batch.samples]
    assert [(s.episode, s.role, s.reward, s.advantage) for s in again.samples] == told
    assert {role: reward for _, role, reward, _ in told} == {"asks": 0.5, "answers": 1.0}
    assert left
    for ready in left:
        assert [each.role for each in ready.trajectory.sequences] == ["asks", "answers"]
        assert ready.trajectory.role_rewards["answers"] >= 2
