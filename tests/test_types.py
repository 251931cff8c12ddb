"""Records: what extends what, and that nothing missing looks like a number."""

import numpy as np
import pytest

from flash.conversation import TokenSequence
from flash.types import Completion, Sample, SampledSequence


def sequence() -> SampledSequence:
    growing = TokenSequence([5, 6])
    growing.add_sampled(
        Completion(
            token_ids=[7, 8], logprobs=[-0.5, -0.25], versions=[3, 4], temperature=0.5,
            finish_reason="stop",
        )
    )  # fmt: skip
    return growing.snapshot()


def test_a_snapshot_says_of_each_token_what_the_engine_said():
    found = sequence()
    assert found.token_ids.tolist() == [5, 6, 7, 8]
    assert found.loss_mask.tolist() == [0, 0, 1, 1]
    assert found.logprobs.tolist() == [0, 0, -0.5, -0.25]
    assert found.versions.tolist() == [-1, -1, 3, 4]
    assert found.temperatures.tolist() == [1, 1, 0.5, 0.5]
    assert found.turns.tolist() == [-1, -1, 0, 0]


def test_a_sample_is_the_sequence_and_what_it_was_worth():
    sampled = sequence()
    worth = {"advantage": 1.5, "reward": 2.0, "turn_rewards": (2.0,), "group": 3, "episode": 4}
    sample = Sample.extending(sampled, **worth)
    assert sample.token_ids is sampled.token_ids, "not a copy"
    assert {name: getattr(sample, name) for name in worth} == worth
    again = Sample.extending(sample, advantage=np.ones(4, np.float32))
    assert np.asarray(again.advantage).tolist() == [1, 1, 1, 1]
    assert (again.reward, again.logprobs is sampled.logprobs) == (2.0, True)


@pytest.mark.parametrize("missing", ["advantage", "reward", "turn_rewards", "group", "episode"])
def test_a_sample_without_all_that_is_known_of_it_can_not_be_made(missing):
    worth = {"advantage": 1.5, "reward": 2.0, "turn_rewards": (), "group": 3, "episode": 4}
    del worth[missing]
    with pytest.raises(TypeError, match=missing):
        Sample.extending(sequence(), **worth)
