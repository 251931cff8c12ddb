"""The experts that tokens were routed to, as bytes: `.npy`, as vLLM answers them.

Experts ─► packed ─► the log, explorers, an embedded worker's answer ─► unpacked ─► Experts
"""

import io
import math
from typing import Any

import numpy as np
from numpy.lib import format as untyped_npy

from flash.types import Experts

npy: Any = untyped_npy

_FEWEST_AXES, _MOST_AXES = 2, 3  # vLLM has one for the layers


def packed(experts: Experts) -> bytes:
    """See `unpacked`."""
    file = io.BytesIO()
    npy.write_array(file, experts, version=(1, 0), allow_pickle=False)
    return file.getvalue()


def unpacked(data: bytes) -> Experts:
    """Of integers of any size. ValueError for bytes that are something else."""
    file = io.BytesIO(data)
    if npy.read_magic(file) != (1, 0):
        raise ValueError("experts in another version of .npy than 1.0")
    shape, by_columns, dtype = npy.read_array_header_1_0(file)
    if not _FEWEST_AXES <= len(shape) <= _MOST_AXES or by_columns or dtype.kind not in "iu":
        raise ValueError(f"experts as {dtype} {list(shape)}")
    flat = np.frombuffer(data, dtype, offset=file.tell())
    return flat.reshape(shape[0], math.prod(shape[1:])).astype(np.int16)
