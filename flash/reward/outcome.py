"""What an agent or a reward function may answer to the question what an episode was worth."""

from collections.abc import Mapping

from flash.answers import number, shown, truth
from flash.errors import RewardFailure


def outcome(answer: object, who: str) -> tuple[float, bool | None]:
    """Reward and, if it is told, success of an answer. RewardFailure if it holds no reward."""
    told = answer if isinstance(answer, Mapping) else {"reward": answer}
    reward = number(told.get("reward"))
    if reward is None:
        raise RewardFailure(
            f"{who} answered {shown(answer)}: it must be a finite number, or a mapping with such "
            f"a number as 'reward'"
        )
    success = told.get("success")
    if success is None:
        return reward, None
    if (succeeded := truth(success)) is None:
        raise RewardFailure(f"{who} answered {shown(answer)}: 'success' must be true or false")
    return reward, succeeded
