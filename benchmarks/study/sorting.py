"""Sorting digits, taught by a teacher that errs: a policy that knows how, and is often wrong.

That is where reinforcement learning starts with a language model, too. A sum of a few tokens, a
success or failure as a whole, and seconds to learn.
"""

import random
import string
import zlib
from typing import Any

import gymnasium
from gymnasium import spaces

from flash.types import Observation, Task, Turn

_DIGITS = "0123456789"
_HELDOUT_SHARE = 5  # one list of so many is held out


class SortingEnv(gymnasium.Env[str, str]):
    """Reward 1 if the action is the digits in ascending order, else 0.

    Args:
        length: digits in a list.
        mistakes: the chance of each digit of a demonstration to be any digit.
        heldout: whether lists are those that are kept from training.
    """

    def __init__(self, *, length: int = 4, mistakes: float = 0.3, heldout: bool = False) -> None:
        self.observation_space = spaces.Text(max_length=100, charset=string.printable)
        self.action_space = spaces.Text(max_length=100, min_length=0, charset=string.printable)
        self._length, self._mistakes, self._heldout = length, mistakes, heldout
        self._digits: list[str] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        rng = random.Random(seed)
        while True:
            self._digits = rng.choices(_DIGITS, k=self._length)
            text = " ".join(self._digits)
            if (zlib.crc32(text.encode()) % _HELDOUT_SHARE == 0) == self._heldout:
                return text, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        right = action.split() == sorted(self._digits)
        return "", float(right), True, False, {"success": right}

    def vocabulary(self) -> list[str]:
        """Every word of observations and actions."""
        return list(_DIGITS)

    def demonstrate(self, task: Task) -> list[Turn]:
        """The sorted digits, with mistakes."""
        text, info = self.reset(seed=task.seed)
        rng = random.Random(f"mistakes {task.seed}")
        told = [
            rng.choice(_DIGITS) if rng.random() < self._mistakes else digit
            for digit in sorted(self._digits)
        ]
        return [Turn(Observation(text=text, info=info), " ".join(told))]
