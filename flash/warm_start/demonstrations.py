"""Demonstrations as samples: what a warm start trains on, with a weight for every token.

    Turn(observation, action) … ──style──→ prompt tokens | action tokens | prompt tokens | …
                                 weight        0.5              1 (0 if not to be imitated)

Observation tokens are worth training on too: names are first learned by reading lists.
"""

from collections.abc import Sequence
from typing import Protocol

from flash.types import PromptStyle, Sample, Turn


class TeachingStyle(PromptStyle, Protocol):
    """A prompt style that can also write an action down as tokens."""

    def spell(self, action: str) -> list[int]:
        """The tokens that would have to be sampled for this action, with the stop token."""
        ...


def to_sample(
    turns: Sequence[Turn],
    style: TeachingStyle,
    *,
    action_weight: float = 1.0,
    observation_weight: float = 0.5,
    episode: int = 0,
) -> Sample:
    """One demonstration as one sample; `loss_mask` holds the weights, versions are all -1.

    `episode` is the number that errors name the sample by.

    Raises ValueError for a demonstration without turns.
    """
    if not turns:
        raise ValueError("turns is empty: a demonstration needs at least one turn")
    token_ids: list[int] = []
    weights: list[float] = []
    of_turns: list[int] = []
    action: list[int] = []
    for number, turn in enumerate(turns):
        prompt = style.next(turn.observation, action) if action else style.first(turn.observation)
        action = style.spell(turn.action)
        token_ids += prompt + action
        weights += [observation_weight] * len(prompt)
        weights += [action_weight if turn.imitate else 0.0] * len(action)
        of_turns += [-1] * len(prompt) + [number] * len(action)
    return Sample.supervised(token_ids, weights, turns=of_turns, episode=episode)
