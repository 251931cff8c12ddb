"""What batches imitate beside their samples: in which order, and what it leaves untouched."""

from collections import Counter

import numpy as np
import pytest

from flash.fakes import FakeCrew, FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.expert import ShuffledExpert
from flash.rollout.loop import RolloutLoop
from flash.types import ExpertSequence, ExpertShare, Task
from flash.virtual_time import in_virtual_time
from tests.rollout.test_crew import played
from tests.steady import weights


def trajectory(number: int, sequences: int = 1) -> list[ExpertSequence]:
    return [
        ExpertSequence(
            token_ids=np.array([number, turn]), loss_mask=np.ones(2, np.float32), source=f"{number}"
        )
        for turn in range(sequences)
    ]


def shuffled(count: int = 10, *, episodes: int = 4, seed: int = 0) -> ShuffledExpert:
    trajectories = [trajectory(number) for number in range(count)]
    return ShuffledExpert(trajectories, episodes=episodes, weight=0.1, seed=seed)


def numbers(share: ExpertShare) -> list[int]:
    return [int(sequence.source) for sequence in share.sequences]


def test_each_trajectory_comes_once_before_any_comes_again_in_another_order():
    expert = shuffled()
    order = [number for version in range(10) for number in numbers(expert(version))]
    epochs = [order[first : first + 10] for first in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_version_and_the_seed_alone_say_which_come():
    asked, another = shuffled(), shuffled()
    for version in (7, 0, 7, 3):
        assert numbers(asked(version)) == numbers(another(version))
    others = [numbers(shuffled(seed=seed)(0)) for seed in range(10)]
    assert len({tuple(one) for one in others}) > 5


def test_all_sequences_of_a_trajectory_come_together_and_have_the_weight():
    expert = ShuffledExpert([trajectory(0, 2), trajectory(1, 3)], episodes=2, weight=0.25, seed=0)
    share = expert(0)
    assert Counter(numbers(share)) == {0: 2, 1: 3}
    assert share.weight == 0.25


async def batches(
    expert: ShuffledExpert | None, *, parts: bool
) -> tuple[list[tuple[object, ...]], list[ExpertShare | None], dict[str, object]]:
    """What is handed over, with all that is said of it; and what it imitates."""
    told: list[tuple[object, ...]] = []
    shares: list[ExpertShare | None] = []
    async with InferenceHub([FakeWorker("w")]) as hub:
        crew = FakeCrew(hub, lambda episode: played(hub.version))
        async with RolloutLoop(
            hub, crew=crew, tasks=map(Task, range(10**6)), batch_size=4, group_size=2, alpha=1,
            expert=expert,
        ) as loop:  # fmt: skip
            for version in range(1, 5):
                last = False
                while not last:
                    batch = await (loop.next_part() if parts else loop.next_batch())
                    last = batch.last
                    shares.append(batch.expert)
                    samples = [(s.episode, s.advantage, s.reward) for s in batch.samples]
                    told.append((batch.version, last, samples, dict(batch.metrics)))
                await loop.publish(weights(version))
            counts = loop.ledger.metrics()
    return told, shares, counts


@pytest.mark.parametrize("parts", [False, True])
@in_virtual_time
async def test_batches_are_what_they_are_without_and_the_last_part_has_the_share(parts):
    alone, nothing, counts = await batches(None, parts=parts)
    told, shares, with_expert = await batches(shuffled(), parts=parts)
    assert told == alone
    assert counts == with_expert
    assert set(nothing) == {None}
    found = [numbers(share) if share else None for share in shares]
    expert = shuffled()
    assert found == [numbers(expert(version)) if last else None for version, last, *_ in told]
    assert len([share for share in found if share]) == 4
