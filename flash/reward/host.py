"""A process that computes rewards, one at a time."""

from typing import Any

from flash import registry
from flash.process import serve
from flash.types import Played


class RewardHost:
    """Answers the calls of `flash.reward.processes`."""

    def configure(self, function: str) -> None:
        self._score = registry.function(function, "reward.run")

    def score(self, played: Played) -> Any:
        return self._score(played)


if __name__ == "__main__":
    serve(RewardHost())
