"""What an agent or a reward function may answer to the question what an episode was worth."""

import math
from collections.abc import Mapping
from numbers import Real

import numpy as np

from flash.errors import RewardFailure


def outcome(answer: object, who: str) -> tuple[float, bool | None]:
    """Reward and, if it is told, success of an answer. RewardFailure if it holds no reward."""
    told = answer if isinstance(answer, Mapping) else {"reward": answer}
    reward = told.get("reward")
    if not isinstance(reward, Real) or isinstance(reward, bool) or not math.isfinite(reward):
        raise RewardFailure(
            f"{who} answered {answer!r}: it must be a finite number, or a mapping with such "
            f"a number as 'reward'"
        )
    success = told.get("success")
    if success is not None and not isinstance(success, bool | np.bool_):
        raise RewardFailure(f"{who} answered {answer!r}: 'success' must be true or false")
    return float(reward), None if success is None else bool(success)
