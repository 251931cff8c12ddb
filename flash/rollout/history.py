"""What was said in an episode that a crash cut off, so that another can go on from there."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flash.types import Completion, Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What the policy answered; `prompt_sum` tells to which prompt."""

    prompt_sum: int
    completion: Completion


History = Sequence[Observation | Sampled]
"""In its order: what the environment answered, and what the policy."""


def prompt_sum(token_ids: Sequence[int]) -> int:
    """The same for equal prompts; of others hardly ever."""
    return zlib.crc32(np.asarray(token_ids, "<i4").tobytes())
