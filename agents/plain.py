"""A compact prompt style for small models: observation, goal, action marker, action, and so on.

    observation goal <act> action <stop> observation goal <act> action <stop> …

There is no chat template and no instruction. Two things matter to a small model: the marker that
starts each action (without it the model continues the observation's list) and the goal repeated
right before each action, where it is copied from.
"""

from collections.abc import Sequence
from typing import Any

from flash.types import Observation
from flash.warm_start.small_policy import ACTION_TOKEN


class PlainStyle:
    """PromptStyle without frills, for policies of `flash.small_policy` and other base models.

    Args:
        tokenizer: a Hugging Face tokenizer; its end-of-sequence token ends an action.
        action_start: text that starts each action; by default the tokenizer's own `<act>` token,
            or "\\n> " where it has none.
        repeat_goal: put `info["goal"]`, where the environment gives one, before each action.
    """

    def __init__(
        self, tokenizer: Any, *, action_start: str | None = None, repeat_goal: bool = True
    ) -> None:
        stop = tokenizer.eos_token_id
        if stop is None:
            raise ValueError(
                "tokenizer has no end-of-sequence token, so no action could end: set eos_token"
            )
        self._tokenizer = tokenizer
        self._stop: int = stop
        self.stop_token_ids: tuple[int, ...] = (stop,)
        if action_start is None:
            known = ACTION_TOKEN in tokenizer.get_vocab()
            action_start = ACTION_TOKEN if known else "\n> "
        self._action_start = self._encode(action_start)
        self._repeat_goal = repeat_goal
        self._goal: tuple[str, list[int]] = ("", [])  # replaced whole: threads may come here

    def first(self, observation: Observation) -> list[int]:
        return self._prompt(observation)

    def next(self, observation: Observation, sampled: Sequence[int]) -> list[int]:
        stop = [] if sampled and sampled[-1] == self._stop else [self._stop]
        return stop + self._prompt(observation)

    def action(self, sampled: Sequence[int]) -> str:
        # Special tokens stay visible: an action with a marker in it is a wrong action.
        tokens = sampled[:-1] if sampled and sampled[-1] == self._stop else sampled
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=False)
        return text.strip()

    def spell(self, action: str) -> list[int]:
        """The tokens that would have to be sampled for this action, with the stop token."""
        return [*self._encode(action), self._stop]

    def _prompt(self, observation: Observation) -> list[int]:
        goal = str(observation.info.get("goal", "")) if self._repeat_goal else ""
        text = observation.text
        if goal and text.rstrip(" .\n").endswith(goal):
            goal = ""  # the first observation of a text game ends with it already
        return self._encode(text) + self._encode_goal(goal) + self._action_start

    def _encode_goal(self, goal: str) -> list[int]:
        known, tokens = self._goal
        if goal != known:
            tokens = self._encode(goal)
            self._goal = goal, tokens
        return tokens

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens
