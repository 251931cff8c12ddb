"""Plain data of what is none: for files and messages that hold no other."""

import math
import re
from collections.abc import Hashable, Mapping
from types import NoneType
from typing import Any

import numpy as np

_HAS_HALF_A_PAIR = re.compile("[\ud800-\udfff]").search


def plain(value: Any) -> Any:
    """As JSON can hold it: it has no nan and no infinity; both become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    return repr(value)


def packable(state: Hashable) -> Any:
    """Itself, if it comes back as what equals it."""
    if type(state) is tuple:
        return [packable(part) for part in state]
    if type(state) is str:
        return repr(state) if _HAS_HALF_A_PAIR(state) else state
    if type(state) is int:
        return state if -(2**63) <= state < 2**64 else repr(state)
    return state if type(state) in (float, bytes, bool, NoneType) else repr(state)


def hashable(state: Any) -> Hashable:
    """What `packable` made a list of."""
    return tuple(map(hashable, state)) if isinstance(state, list) else state
