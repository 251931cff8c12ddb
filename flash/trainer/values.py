"""From a critic's values to advantages and returns: in the controller, which has whole episodes.

Legend: T tokens of a sample; R trained tokens of an episode or of a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from flash.trainer.advantage_settings import Gae
from flash.trainer.advantages import Floats, gae, to_unit_deviation
from flash.types import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class ValuedSample(Sample):
    """A sample with its critic's values before the step, and the returns to learn, both [T]."""

    values: NDArray[np.float32]
    returns: NDArray[np.float32]


def trained(sample: Sample) -> NDArray[np.bool_]:
    """Which of its tokens are trained, [T]: never the first, which nothing predicts."""
    trained_T: NDArray[np.bool_] = sample.loss_mask > 0
    trained_T[0] = False
    return trained_T


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
        values_R = np.concatenate([values[i] for i in members])
        rewards_R = token_rewards([samples[i] for i in members])
        advantages_R = gae(rewards_R, values_R, gamma=settings.gamma, lam=settings.lam)
        ends = np.cumsum([len(values[i]) for i in members])[:-1]
        for index, part in zip(members, np.split(advantages_R, ends), strict=True):
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
    """The rewards of one episode at its trained tokens, [R].

    That of a turn follows the turn's last token; without rewards of turns, the episode's follows
    its last token.
    """
    rewards_R = np.zeros(sum(int(trained(sample).sum()) for sample in samples))
    turns = [sample.turns[trained(sample)] for sample in samples if sample.turns is not None]
    turn_rewards = samples[0].turn_rewards
    if not turn_rewards or len(turns) < len(samples):
        rewards_R[-1] = samples[0].reward
        return rewards_R
    # A turn without a trained token adds to the one before it.
    ends = np.searchsorted(np.concatenate(turns), np.arange(len(turn_rewards)), side="right") - 1
    np.add.at(rewards_R, np.maximum(ends, 0), turn_rewards)
    return rewards_R


def _valued(
    sample: Sample, advantages_R: Floats, values_R: Floats, returns_R: Floats
) -> ValuedSample:
    def of_tokens(of_trained: Floats) -> NDArray[np.float32]:
        of_T = np.zeros(sample.num_tokens, np.float32)
        of_T[trained(sample)] = of_trained
        return of_T

    kept = {field.name: getattr(sample, field.name) for field in fields(Sample)}
    return ValuedSample(
        **{**kept, "advantage": of_tokens(advantages_R)},
        values=of_tokens(values_R),
        returns=of_tokens(returns_R),
    )


def _metrics(values_R: Floats, returns_R: Floats) -> dict[str, float]:
    found = {
        "critic/value_mean": float(values_R.mean()),
        "critic/return_mean": float(returns_R.mean()),
    }
    if spread := float(returns_R.var()):
        found["critic/explained_variance"] = 1 - float((returns_R - values_R).var()) / spread
    return found
