"""An environment with tools of its own: `--env examples.tools.shelf:ShelfEnv`, with
`--env.eval_options '{}' --agent.style chat` and a model that calls tools.

A number is hidden in one of some boxes. `look` tells what is in one, `name` says the number, which
ends the episode: that call is a step.
"""

import random
from typing import Any, ClassVar


class ShelfEnv:
    metadata: ClassVar = {"deterministic": True}
    tools = ("look", "name")

    def __init__(self, boxes: int = 3, looks: int = 3) -> None:
        self.boxes = boxes
        self.looks = looks

    def reset(self, *, seed: int) -> tuple[str, dict[str, Any]]:
        chance = random.Random(seed)
        self.number = chance.randint(10, 99)
        self.box = chance.randrange(self.boxes)
        self.left = self.looks
        return f"In one of {self.boxes} boxes is a number. You may look {self.looks} times.", {}

    def look(self, box: int) -> str:
        """What is in a box.

        Args:
            box: which, from 0
        """
        if not 0 <= box < self.boxes:
            return f"There is no box {box}."
        if self.left == 0:
            return "You have looked as often as you may."
        self.left -= 1
        return f"The number {self.number}." if box == self.box else "Nothing."

    def name(self, number: int) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Says the number, once.

        Args:
            number: the hidden one
        """
        right = number == self.number
        return "Right." if right else "Wrong.", float(right), True, False, {"success": right}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "Look into boxes, then name the number.", 0.0, False, False, {}

    def close(self) -> None: ...
