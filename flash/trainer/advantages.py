"""From the rewards of a group to the advantages of its episodes."""

import numpy as np
from numpy.typing import NDArray


def grpo(rewards_G: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rewards of one group, centred and divided by their standard deviation, [G].

    Equal rewards give zeros: the group says nothing about which action is better.
    Raises ValueError for a group of one. Shao et al. 2024 (DeepSeekMath), section 4.1.2.
    """
    if len(rewards_G) < 2:
        raise ValueError(
            "a group of 1 has no relative advantage: set group_size to 2 or more, or pass "
            "RolloutLoop another advantages function"
        )
    centred_G = rewards_G - rewards_G.mean()
    deviation = float(rewards_G.std())
    if deviation < 1e-8:
        return np.zeros_like(centred_G)
    return np.asarray(centred_G / deviation)
