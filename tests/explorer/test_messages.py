"""What an explorer tells is what it played, whatever its agent made it of."""

from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from typing_extensions import TypeAliasType

from flash.explorer.messages import Ended, Said, _dtype, decoder, encoder, exact
from flash.explorer.remote import RemoteEpisode
from flash.rollout.history import Sampled
from flash.types import Completion, SampledSequence, Task, ToolUse, Trajectory


def test_numbers_and_arrays_of_other_kinds_arrive_as_what_they_are():
    given = SampledSequence(
        token_ids=np.array([5, 6, 7], np.int32),
        loss_mask=np.array([0, 1, 1]),
        logprobs=np.array([0, -0.5, -0.25]),
        versions=[-1, 3, 3],
        temperatures=np.ones(6, np.float32)[::2],
        turns=np.array([-1, 0, 0], np.int8),
        experts=np.arange(6, dtype=np.int16).reshape(3, 2),
        role="coder",
    )
    trajectory = Trajectory(
        sequences=[given], reward=np.float64(2), turns=np.int64(1), success=np.bool_(True),
        turn_rewards=np.array([0.5]), turn_states=["a", ("b", 1)],
        role_rewards={"coder": np.float32(0.5)},
    )  # fmt: skip
    uses = {"add": ToolUse(calls=2, errors=1, late=1, seconds=0.5)}
    told = Ended(
        trajectory=exact(trajectory), prompt_tokens=1, generated_tokens=2, turns=1, seconds={},
        tool_uses=uses,
    )  # fmt: skip
    ended = decoder(Ended).decode(encoder.encode(told))
    assert ended.tool_uses == uses
    heard = ended.trajectory
    (sequence,) = heard.sequences
    for name in SampledSequence.__annotations__:
        np.testing.assert_array_equal(getattr(sequence, name), getattr(given, name))
    assert (heard.reward, heard.turns, heard.success) == (2.0, 1, True)
    assert (heard.turn_rewards, heard.turn_states) == ([0.5], ["a", ("b", 1)])
    assert heard.role_rewards == {"coder": 0.5}


async def test_an_episode_elsewhere_knows_at_its_end_what_it_called():
    uses = {"add": ToolUse(calls=2)}
    episode = RemoteEpisode(1, Task(0), hub=None)
    episode.follow(Ended(prompt_tokens=1, generated_tokens=2, turns=1, seconds={}, tool_uses=uses))
    assert episode.tool_uses == uses


@pytest.mark.parametrize("experts", [np.array([[3, -1], [0, 7]], np.int16), None])
def test_the_experts_of_a_response_arrive_with_it(experts):
    completion = Completion(
        token_ids=[5, 6], logprobs=[-0.5, -0.25], versions=[3, 3], temperature=1.0,
        finish_reason="stop", experts=experts,
    )  # fmt: skip
    told = encoder.encode(Said(Sampled(prompt_sum=1, completion=completion)))
    heard = decoder(Said).decode(told).step.completion
    assert heard.token_ids == [5, 6]
    if experts is None:
        assert heard.experts is None
        return
    np.testing.assert_array_equal(heard.experts, experts)
    with pytest.raises(msgspec.ValidationError):
        decoder(Said).decode(told.replace(b"NUMPY", b"NUMPX"))


_T = TypeVar("_T", bound=np.generic)
_OF_NUMPY_2_5 = TypeAliasType("_OF_NUMPY_2_5", np.ndarray[Any, np.dtype[_T]], type_params=(_T,))


@pytest.mark.parametrize("array", [NDArray, _OF_NUMPY_2_5])
def test_an_array_s_kind_is_read_from_both_kinds_of_numpy_s_alias(array: Any) -> None:
    assert _dtype(array[np.int64]) is np.int64
