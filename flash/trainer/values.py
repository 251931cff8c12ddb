"""Advantages that take what the ranks compute: of a critic's values, or less a divergence.

In the controller, which has whole episodes.

[T] is over the trained tokens of a sample, an episode or a batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from flash.trainer.advantage_settings import Gae
from flash.trainer.advantages import Floats, gae, to_unit_deviation
from flash.trainer.config import TrainerConfig
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
        advantages = _whitened(advantages)
    if settings.clip is not None:
        advantages = [np.clip(a, -settings.clip, settings.clip) for a in advantages]
    valued = [
        _valued(sample, *of_sample)
        for sample, *of_sample in zip(samples, advantages, values, returns, strict=True)
    ]
    return valued, _metrics(np.concatenate(values), np.concatenate(returns))


def less_penalties(
    samples: Sequence[Sample], penalties: Sequence[Floats], config: TrainerConfig
) -> list[Sample]:
    """The samples with β·`penalties` taken from their advantages, and only then whitened, clipped.

    Hu et al. 2025 (REINFORCE++), eqs. 4 and 5.
    """
    advantages = [
        np.broadcast_to(sample.advantage, sample.num_tokens)[trained(sample)]
        - config.kl.coefficient * penalty_T
        for sample, penalty_T in zip(samples, penalties, strict=True)
    ]
    finished = _whitened(advantages)
    if (clip := config.advantages.clip) is not None:
        finished = [np.clip(a, -clip, clip) for a in finished]
    return [
        replace(sample, advantage=_of_tokens(sample, advantages_T))
        for sample, advantages_T in zip(samples, finished, strict=True)
    ]


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
    return ValuedSample.extending(
        sample,
        advantage=_of_tokens(sample, advantages_T),
        values=_of_tokens(sample, values_T),
        returns=_of_tokens(sample, returns_T),
    )


def _whitened(of_samples: Sequence[Floats]) -> list[Floats]:
    """With mean 0 and deviation 1 over all of them."""
    flat = to_unit_deviation(np.concatenate(of_samples))
    return np.split(flat, np.cumsum([len(a) for a in of_samples])[:-1])


def _of_tokens(sample: Sample, numbers_T: Floats) -> NDArray[np.float32]:
    """Numbers of the trained tokens at their places, 0 elsewhere, [S]."""
    numbers_S = np.zeros(sample.num_tokens, np.float32)
    numbers_S[trained(sample)] = numbers_T
    return numbers_S


def _metrics(values_T: Floats, returns_T: Floats) -> dict[str, float]:
    found = {
        "critic/value_mean": float(values_T.mean()),
        "critic/return_mean": float(returns_T.mean()),
    }
    if spread := float(returns_T.var()):
        found["critic/explained_variance"] = 1 - float((returns_T - values_T).var()) / spread
    return found
