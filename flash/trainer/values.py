"""From a critic's values to advantages and returns: in the controller, which has whole episodes.

[T] is over the trained tokens of a sample, an episode or a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flash.trainer.advantage_settings import Gae
from flash.trainer.advantages import Floats, gae, to_unit_deviation
from flash.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuedSample(Sample):
    """A sample with its critic's values before the step, and the returns to learn, both [S]."""

    values: NDArray[np.float32]
    returns: NDArray[np.float32]


def trained(sample: Sample) -> NDArray[np.bool_]:
    """Which of its tokens are trained, [S]: never the first, which nothing predicts."""
    trained_S: NDArray[np.bool_] = sample.loss_mask > 0
    trained_S[0] = False
    return trained_S


def with_values(
    samples: Sequence[Sample], values: Sequence[Floats], settings: Gae
) -> tuple[list[ValuedSample], dict[str, float]]:
    """The samples with advantages and returns, and what the critic is worth so far.

    `values` has those of each sample's trained tokens. Samples of one episode are one trajectory,
    in their order.
    """
    episodes: dict[int, list[int]] = {}
    for index, sample in enumerate(samples):
        episodes.setdefault(sample.episode, []).append(index)
    advantages: list[Floats] = [np.zeros(0)] * len(samples)
    for members in episodes.values():
        values_T = np.concatenate([values[i] for i in members])
        rewards_T = token_rewards([samples[i] for i in members])
        advantages_T = gae(rewards_T, values_T, gamma=settings.gamma, lam=settings.lam)
        ends = np.cumsum([len(values[i]) for i in members])[:-1]
        for index, part in zip(members, np.split(advantages_T, ends), strict=True):
            advantages[index] = part
    # Whitening must not touch them: they are what the rewards say.
    returns = [a + v for a, v in zip(advantages, values, strict=True)]
    if settings.whiten:
        flat = to_unit_deviation(np.concatenate(advantages))
        advantages = np.split(flat, np.cumsum([len(a) for a in advantages])[:-1])
    if settings.clip is not None:
        advantages = [np.clip(a, -settings.clip, settings.clip) for a in advantages]
    valued = [
        _valued(sample, *of_sample)
        for sample, *of_sample in zip(samples, advantages, values, returns, strict=True)
    ]
    return valued, _metrics(np.concatenate(values), np.concatenate(returns))


def token_rewards(samples: Sequence[Sample]) -> Floats:
    """The rewards of one episode at its trained tokens, [T].

    That of a turn follows the turn's last token; without rewards of turns, the episode's follows
    its last token.
    """
    rewards_T = np.zeros(sum(int(trained(sample).sum()) for sample in samples))
    turn_rewards = samples[0].turn_rewards
    if not turn_rewards:
        rewards_T[-1] = samples[0].reward
        return rewards_T
    turns_T = np.concatenate([sample.turns[trained(sample)] for sample in samples])
    # A turn without a trained token adds to the one before it.
    ends = np.searchsorted(turns_T, np.arange(len(turn_rewards)), side="right") - 1
    np.add.at(rewards_T, np.maximum(ends, 0), turn_rewards)
    return rewards_T


def _valued(
    sample: Sample, advantages_T: Floats, values_T: Floats, returns_T: Floats
) -> ValuedSample:
    def of_tokens(numbers_T: Floats) -> NDArray[np.float32]:
        numbers_S = np.zeros(sample.num_tokens, np.float32)
        numbers_S[trained(sample)] = numbers_T
        return numbers_S

    return ValuedSample.extending(
        sample,
        advantage=of_tokens(advantages_T),
        values=of_tokens(values_T),
        returns=of_tokens(returns_T),
    )


def _metrics(values_T: Floats, returns_T: Floats) -> dict[str, float]:
    found = {
        "critic/value_mean": float(values_T.mean()),
        "critic/return_mean": float(returns_T.mean()),
    }
    if spread := float(returns_T.var()):
        found["critic/explained_variance"] = 1 - float((returns_T - values_T).var()) / spread
    return found
