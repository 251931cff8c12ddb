"""Records: what extends what, and that nothing missing looks like a number."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def token_by_token(parts) -> SampledSequence:
    """What a TokenSequence of these parts holds, written down for each token by itself."""
    rows, trained, turn = [], 0, -1
    for part in parts:
        if isinstance(part, list):
            rows += [(token_id, 0, 0, -1, 1, -1) for token_id in part]
            continue
        completion, named = part
        turn = turn + 1 if named is None else named
        said = zip(completion.token_ids, completion.logprobs, completion.versions, strict=True)
        rows += [(t, 1, logprob, u, completion.temperature, turn) for t, logprob, u in said]
        trained = len(rows) if completion.token_ids else trained
    columns = zip(*rows[:trained], strict=True) if trained else [()] * 6
    dtypes = (np.int64, np.float32, np.float32, np.int64, np.float32, np.int64)
    names = [f.name for f in fields(SampledSequence) if f.name not in ("experts", "role")]
    return SampledSequence(
        **{name: np.array(c, dtype) for name, c, dtype in zip(names, columns, dtypes, strict=True)}
    )


@st.composite
def completions(draw):
    said = draw(
        st.lists(
            st.tuples(st.integers(0, 2**31), st.floats(-50, 0), st.integers(0, 3)),
            max_size=4,
        )
    )
    token_ids, logprobs, versions = map(list, zip(*said, strict=True)) if said else ([], [], [])
    return Completion(
        token_ids=token_ids, logprobs=logprobs, versions=versions,
        temperature=draw(st.floats(0, 2)), finish_reason="stop",
    )  # fmt: skip


read = st.lists(st.integers(0, 2**31), max_size=4)
sampled = st.tuples(completions(), st.none() | st.integers(0, 9))


@given(st.lists(read | sampled, max_size=6))
def test_a_sequence_holds_of_each_token_what_was_said_of_it(parts):
    growing = TokenSequence([])
    for part in parts:
        if isinstance(part, list):
            growing.add_prompt(part)
        else:
            growing.add_sampled(part[0], turn=part[1])
    found, expected = growing.snapshot(), token_by_token(parts)
    for field in fields(SampledSequence):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name == "role":
            assert ours == "", "one plays alone"
            continue
        if field.name == "experts":
            assert ours is None, "nobody told any"
            continue
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist(), field.name
    assert growing.token_ids[: found.num_tokens] == found.token_ids.tolist()


def test_a_snapshot_stays_as_it_is_when_the_sequence_grows():
    growing = TokenSequence([5])
    more = Completion(
        token_ids=[7], logprobs=[-1.0], versions=[3], temperature=1.0, finish_reason="stop"
    )
    growing.add_sampled(more)
    before = growing.snapshot()
    more.token_ids[0] = more.versions[0] = 9
    growing.add_sampled(more)
    assert before.token_ids.tolist() == [5, 7]
    assert before.versions.tolist() == [-1, 3]
    assert growing.snapshot().token_ids.tolist() == [5, 7, 9]
    assert growing.snapshot().versions.tolist() == [-1, 3, 9], "each as it was when it was added"


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
