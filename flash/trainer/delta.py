"""What an export has in other values than the one before: a place and a value for each.

Of a step's bfloat16 values few change; then that is less to read, to send and to load than all of
them. Where many do, as in float32, they are only counted.
"""

from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from flash.worker.delta import ALIGNED, FOLDER, KEY, PLACE_BYTES, Delta, TensorInfo, file_in
from flash.worker.tensors import tensors_in, words_of

# Of the bytes of all values: beyond it too little is saved for what a delta takes.
_MOST = 0.5
_PLACE = np.int32
_MOST_VALUES = np.iinfo(_PLACE).max
_THREADS = 8  # numpy lets them run side by side


def write_delta(before: Path, after: Path) -> float:
    """The share of the values of `after` that changed; it has a delta then, if they are few.

    A tensor that `before` has not, or in another shape or dtype, has changed as a whole.
    """
    old, new = tensors_in(before), tensors_in(after)

    def told(name: str) -> TensorInfo:
        tensor, words = new[name], _words(new[name])
        changed = tensor.numel()
        if _alike(tensor, old.get(name)):
            changed = int(np.count_nonzero(words != _words(old[name])))
        dtype, total = str(tensor.dtype).removeprefix("torch."), int(words.sum(dtype=np.int64))
        return TensorInfo(name, dtype, list(tensor.shape), changed, total)

    def part(name: str) -> Tensor:
        words = _words(new[name])
        places = np.flatnonzero(words != _words(old[name]))
        data = (places.astype(_PLACE).view(np.uint8), words[places].view(np.uint8))
        padding = np.zeros(-sum(map(len, data)) % ALIGNED, np.uint8)
        return torch.from_numpy(np.concatenate([*data, padding]))

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="delta") as threads:
        tensors = [info for info in threads.map(told, new) if prod(info.shape)]
        if _pays(tensors, old, new):
            changed = [info.name for info in tensors if info.changed]
            parts = dict(zip(changed, threads.map(part, changed), strict=True))
            delta = msgspec.json.encode(Delta(str(before), tensors)).decode()
            (after / FOLDER).mkdir()
            save_file(parts, file_in(after), {KEY: delta})
    return sum(info.changed for info in tensors) / sum(prod(info.shape) for info in tensors)


def _pays(tensors: list[TensorInfo], old: dict[str, Tensor], new: dict[str, Tensor]) -> bool:
    """Whether what changed can be told, in few enough bytes."""
    if old.keys() != new.keys() or not all(_alike(new[name], old[name]) for name in new):
        return False
    sizes = [(info.changed, new[info.name].itemsize) for info in tensors]
    num_bytes = sum(changed * (PLACE_BYTES + itemsize) for changed, itemsize in sizes)
    whole_bytes = sum(tensor.nbytes for tensor in new.values())
    return num_bytes <= _MOST * whole_bytes and all(
        tensor.numel() <= _MOST_VALUES and tensor.itemsize <= PLACE_BYTES for tensor in new.values()
    )


def _alike(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.dtype == other.dtype and tensor.shape == other.shape


def _words(tensor: Tensor) -> NDArray[np.integer]:
    return words_of(tensor).numpy()
