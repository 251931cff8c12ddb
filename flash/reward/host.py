"""A process that computes rewards, one at a time."""

from flash import registry
from flash.answers import raised
from flash.errors import RewardFailure
from flash.reward.outcome import outcome
from flash.system.process import serve, written
from flash.types import Transcript


class RewardHost:
    """Answers the calls of `flash.reward.processes`, with what these methods return."""

    def configure(self, function: str) -> None:
        self._score = registry.function(function, "reward.run")

    def score(self, transcript: Transcript) -> dict[str, float | bool | None]:
        try:
            answer = self._score(transcript)
        except BaseException as error:  # the boundary to the user's function, sys.exit too
            raise RewardFailure(f"the reward {raised(error)}") from error
        reward, success = outcome(answer, "the reward")
        return {"reward": reward, "success": success}


if __name__ == "__main__":
    serve(RewardHost(), write=written)
