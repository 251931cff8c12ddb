"""An environment of one's own: put out all lamps. CONTRIBUTING.md shows how it is trained.

Any model can be trained on what ends with `step`. The last two methods are for the small policy,
which is made of the environment's words and taught by its expert.
"""

import random
import string
from typing import Any

import gymnasium
from gymnasium import spaces

from flash import Observation, Task, Turn


class LampsEnv(gymnasium.Env[str, str]):
    """A row of lamps; the number of one switches it on or off. Reward 1 when all are off, else 0.

    Args:
        lamps: how many there are; the seed says which are lit at first.
        turns: the episode is cut off after so many.
    """

    metadata = {"render_modes": [], "deterministic": True}  # noqa: RUF012 (gymnasium's own)

    def __init__(self, *, lamps: int = 6, turns: int = 6) -> None:
        if lamps < 1 or turns < 1:
            raise ValueError(f"lamps={lamps} and turns={turns} must be at least 1")
        self.observation_space = spaces.Text(max_length=200, charset=string.printable)
        self.action_space = spaces.Text(max_length=200, min_length=0, charset=string.printable)
        self._numbers = [str(number) for number in range(1, lamps + 1)]
        self._turns = turns
        self._lit: list[str] = []
        self._left = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self._lit = [number for number in self._numbers if self.np_random.random() < 0.5]
        self._lit = self._lit or [self._numbers[-1]]
        self._left = self._turns
        return self._seen(), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        number = action.strip()
        if number in self._numbers:
            self._lit = sorted({*self._lit} ^ {number}, key=int)
        self._left -= 1
        dark = not self._lit
        return self._seen(), float(dark), dark, not dark and self._left == 0, {"success": dark}

    def _seen(self) -> str:
        return f"lit {' '.join(self._lit)}" if self._lit else "dark"

    # ── for a small policy ───────────────────────────────────────────────────────────────────

    def vocabulary(self) -> list[str]:
        """Every word of observations and actions."""
        return ["lit", "dark", *self._numbers]

    def demonstrate(self, task: Task) -> list[Turn]:
        """An expert that is absent-minded: every other lamp is one at random."""
        expert = random.Random(task.seed)
        text, info = self.reset(seed=task.seed, options=dict(task.options))
        turns, over = [], False
        while not over:
            number = expert.choice(self._numbers if expert.random() < 0.5 else self._lit)
            turns.append(Turn(Observation(text=text, info=info), number))
            text, _, terminated, truncated, info = self.step(number)
            over = terminated or truncated
        return turns
