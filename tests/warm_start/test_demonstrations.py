"""A demonstration as a sample: which tokens, and how much each of them weighs."""

import numpy as np
import pytest

from flash.types import Observation, Turn
from flash.warm_start.demonstrations import to_sample


class LettersStyle:
    """A letter is a token; 0 ends an action, 1 begins one."""

    stop_token_ids = (0,)

    def first(self, observation):
        return [*map(ord, observation.text), 1]

    def next(self, observation, sampled):
        assert sampled[-1] == 0, "the action before, as it would have been sampled"
        return self.first(observation)

    def action(self, sampled):
        return "".join(map(chr, sampled[:-1]))

    def spell(self, action):
        return [*map(ord, action), 0]


def turn(text, action, *, imitate=True):
    return Turn(Observation(text=text), action, imitate)


def test_observations_and_actions_alternate_each_with_its_weight():
    turns = [turn("a", "bc"), turn("d", "e", imitate=False), turn("f", "g")]
    sample = to_sample(turns, LettersStyle(), action_weight=2.0, observation_weight=0.25)
    a, b, c, d, e, f, g = map(ord, "abcdefg")
    assert sample.token_ids.tolist() == [a, 1, b, c, 0, d, 1, e, 0, f, 1, g, 0]
    observed, done, detour = 0.25, 2.0, 0.0
    assert sample.loss_mask.tolist() == [
        *[observed] * 2, *[done] * 3, *[observed] * 2, *[detour] * 2, *[observed] * 2, *[done] * 2,
    ]  # fmt: skip


def test_nothing_of_a_demonstration_was_sampled_by_a_policy():
    sample = to_sample([turn("a", "b")], LettersStyle())
    assert sample.loss_mask.tolist() == [0.5, 0.5, 1.0, 1.0]
    assert set(sample.versions.tolist()) == {-1}
    assert not sample.logprobs.any()
    assert set(sample.temperatures.tolist()) == {1.0}
    kinds = [a.dtype for a in (sample.token_ids, sample.loss_mask, sample.logprobs)]
    assert kinds == [np.int64, np.float32, np.float32]


def test_each_word_of_an_action_is_of_its_turn():
    sample = to_sample([turn("a", "bc"), turn("d", "e")], LettersStyle())
    assert sample.turns.tolist() == [-1, -1, 0, 0, 0, -1, -1, 1, 1]


def test_a_demonstration_without_turns_is_refused():
    with pytest.raises(ValueError, match="turns is empty"):
        to_sample([], LettersStyle())
