"""Samples for tests of what trains on them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flash.types import Sample


def fake_sample(
    token_ids: Sequence[int] | NDArray[np.int64],
    loss_mask: Sequence[float] | NDArray[np.float32] | None = None,
    **given: Any,
) -> Sample:
    """A complete sample of these tokens, all trained but the first unless the mask says otherwise.

    They are the first response of an episode, sampled by version 0 at temperature 1 with logprob 0,
    and worth nothing: reward and advantage are 0. Any field can be `given` instead.
    """
    if loss_mask is None:
        loss_mask = [0.0] + [1.0] * (len(token_ids) - 1)
    sampled = np.asarray(loss_mask) > 0
    fields: dict[str, Any] = {
        "token_ids": np.asarray(token_ids, np.int64),
        "loss_mask": np.asarray(loss_mask, np.float32),
        "logprobs": np.zeros(len(token_ids), np.float32),
        "versions": np.where(sampled, 0, -1),
        "temperatures": np.ones(len(token_ids), np.float32),
        "turns": np.where(sampled, 0, -1),
        "advantage": 0.0,
        "reward": 0.0,
        "turn_rewards": (),
        "group": 0,
        "episode": 0,
    }
    return Sample(**fields | given)
