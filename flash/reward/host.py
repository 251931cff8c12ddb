"""A process that computes rewards, one at a time."""

from typing import Any

from flash import registry
from flash.process import serve
from flash.types import Transcript


class RewardHost:
    """Answers the calls of `flash.reward.processes`."""

    def configure(self, function: str) -> None:
        self._score = registry.function(function, "reward.run")

    def score(self, transcript: Transcript) -> Any:
        return self._score(transcript)


if __name__ == "__main__":
    serve(RewardHost())
