"""Demonstrations as samples: what a warm start trains on, with a weight for every token.

    Turn(observation, action) … ──style──→ prompt tokens | action tokens | prompt tokens | …
                                 weight        0.5              1 (0 if not to be imitated)

Observation tokens are worth training on too: names are first learned by reading lists. Messages
become samples likewise, by a chat template in the place of a style.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from flash.conversation import ChatTemplate, Message
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

    def spelled() -> Iterator[tuple[list[int], list[int], float]]:
        action: list[int] = []
        for turn in turns:
            seen = turn.observation
            prompt = style.next(seen, action) if action else style.first(seen)
            action = style.spell(turn.action)
            yield prompt, action, action_weight if turn.imitate else 0.0

    return _sample(spelled(), observation_weight=observation_weight, episode=episode)


def messages_to_sample(
    messages: Sequence[Message], template: ChatTemplate, *, episode: int = 0
) -> Sample:
    """A conversation as one sample, in which the assistant's words are trained.

    It ends with the last of them. Raises ValueError if there are none, or if one is no text.
    """
    said = [number for number, m in enumerate(messages) if m.get("role") == "assistant"]
    if not said:
        raise ValueError("no message is by 'assistant'")

    def spelled() -> Iterator[tuple[list[int], list[int], float]]:
        prompt: list[int] | None = template.prompt(messages[: said[0]])
        for number, following in zip(said, [*said[1:], None], strict=True):
            message = messages[number]
            if not isinstance(message.get("content"), str) or message.get("tool_calls"):
                raise ValueError("an assistant's message is not a text alone")
            if prompt is None:
                raise ValueError("the chat template does not show where an answer ends")
            words = template.words(message["content"])
            yield prompt, words, 1.0
            if following is not None:
                after = messages[number + 1 : following]
                prompt = template.between(messages[:number], message, after, sampled=words)

    return _sample(spelled(), observation_weight=0.0, episode=episode)


def _sample(
    spelled: Iterable[tuple[list[int], list[int], float]],
    *,
    observation_weight: float,
    episode: int,
) -> Sample:
    """Of each turn what is read, what is said after it, and the weight of that."""
    token_ids: list[int] = []
    weights: list[float] = []
    of_turns: list[int] = []
    for number, (read, said, weight) in enumerate(spelled):
        token_ids += read + said
        weights += [observation_weight] * len(read) + [weight] * len(said)
        of_turns += [-1] * len(read) + [number] * len(said)
    return Sample.supervised(token_ids, weights, turns=of_turns, episode=episode)
