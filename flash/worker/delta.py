"""What is to be changed in the weights of one export to have those of the next; imports no torch.

    the next one's folder/delta/delta.safetensors
        of each tensor that changed   bytes: where it did (int32, flat), what is there, padding
        metadata                      whose base; of every tensor: dtype, shape, how many changed,
                                      and the sum of its words

A word is an integer of a value's size. A rank of a server has parts of tensors, fused with others;
so it says of each tensor how many of its values it has, and the sum of their words.
"""

from collections.abc import Sequence
from math import prod
from pathlib import Path

import msgspec
from safetensors import SafetensorError, safe_open

FOLDER = "delta"
KEY = "delta"  # of the metadata
PLACE_BYTES = 4
ALIGNED = 16  # bytes: the tensors that follow one another in a chunk can all be viewed
_MODULUS = 1 << 64

Had = tuple[int, int]  # how many values of a tensor a rank has, and the sum of their words


class TensorInfo(msgspec.Struct, frozen=True, array_like=True):
    """A tensor of the export, changed or not."""

    name: str
    dtype: str
    shape: list[int]
    changed: int
    sum: int


class Delta(msgspec.Struct, frozen=True):
    """`before`: the folder of the export that it changes."""

    before: str
    tensors: list[TensorInfo]


def file_in(export: Path) -> Path:
    return export / FOLDER / "delta.safetensors"


def delta_of(export: Path) -> Delta | None:
    """None if it has none that can be read, or is not there any more."""
    try:
        with safe_open(file_in(export), framework="numpy") as opened:
            return msgspec.json.decode(opened.metadata()[KEY], type=Delta)
    except (OSError, SafetensorError):
        return None


def not_had(delta: Delta, ranks: Sequence[Sequence[Had]]) -> str | None:
    """The first tensor of which the ranks of a server do not have what the export has.

    Ranks may have a tensor several times over, but each part of it as often as the others.
    """
    for number, tensor in enumerate(delta.tensors):
        parts = [rank[number] for rank in ranks]
        values = sum(had for had, _ in parts)
        copies, rest = divmod(values, prod(tensor.shape))
        off = sum(total for _, total in parts) - copies * tensor.sum
        if not copies or rest or off % _MODULUS:
            return tensor.name
    return None
