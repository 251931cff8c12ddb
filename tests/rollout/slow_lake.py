"""FrozenLake whose steps take their time, so that rollout is the slow side of a run."""

import time
from typing import Any

from flash import registry
from flash.types import Task, Turn

_FrozenLake: Any = registry.environment("frozen_lake")


class SlowLake(_FrozenLake):  # type: ignore[misc]
    fast = False

    def demonstrate(self, task: Task) -> list[Turn]:
        self.fast = True
        turns: list[Turn] = super().demonstrate(task)
        return turns

    def step(self, action: Any) -> Any:
        if not self.fast:
            time.sleep(0.01)
        return super().step(action)
