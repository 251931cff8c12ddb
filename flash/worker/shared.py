"""Weights in the memory of one process, read by others on the same device.

    a rank of the trainer: SharedWeights ─► a description in a folder ─► shared_weights: a server

On a GPU what is described is memory by its CUDA IPC handle, on a CPU a file in memory. It stays as
long as the rank keeps it, and the server copies what it reads. Data only: nothing is unpickled.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.multiprocessing import reductions

_untyped: Any = reductions
_ALIGNED = 16  # bytes: a tensor of any dtype can be viewed there, and whole words be summed
_CPU = "cpu"

Layout = Iterable[tuple[str, torch.dtype, torch.Size]]


class _Part(msgspec.Struct, frozen=True):
    name: str
    dtype: str
    shape: list[int]
    start: int
    num_bytes: int


class _CudaMemory(msgspec.Struct, frozen=True):
    """What CUDA and torch need to open memory of another process."""

    handle: bytes
    size_bytes: int
    offset_bytes: int
    ref_counter_handle: bytes
    ref_counter_offset: int
    event_handle: bytes
    event_sync_required: bool


class _Description(msgspec.Struct, frozen=True):
    parts: list[_Part]
    num_bytes: int
    checksum: int
    cuda: _CudaMemory | None


class SharedWeights:
    """Memory for tensors of that layout, to be filled and then told of.

    Raises torch.OutOfMemoryError if the device has none left.
    """

    def __init__(self, layout: Layout, directory: Path, device: torch.device | str) -> None:
        self._directory = directory
        self._device = torch.device(device)
        self._parts: dict[str, _Part] = {}
        end = 0
        for name, dtype, shape in layout:
            num_bytes = prod(shape) * dtype.itemsize
            dtype_name = str(dtype).removeprefix("torch.")
            self._parts[name] = _Part(name, dtype_name, list(shape), end, num_bytes)
            end += -(-num_bytes // _ALIGNED) * _ALIGNED
        if self._device.type == _CPU:
            file = str(_file(directory, _CPU).with_suffix(".bin"))
            self._flat = torch.from_file(file, shared=True, size=end, dtype=torch.uint8)
        else:
            self._flat = torch.zeros(end, dtype=torch.uint8, device=self._device)

    def fill(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies them, which are those of the layout."""
        for name, tensor in tensors:
            part = self._parts[name]
            target = self._flat[part.start : part.start + part.num_bytes]
            target.copy_(tensor.contiguous().reshape(-1).view(torch.uint8))

    def tell(self) -> None:
        """Writes the description, by which others on this device read it."""
        cuda = None
        if self._device.type != _CPU:
            torch.cuda.synchronize(self._device)
            _, args = _untyped.reduce_tensor(self._flat)
            cuda = _CudaMemory(*args[7:10], *args[11:15])
        description = _Description(
            parts=list(self._parts.values()),
            num_bytes=self._flat.numel(),
            checksum=_checksum(self._flat),
            cuda=cuda,
        )
        _file(self._directory, _id_of(self._device)).write_bytes(msgspec.json.encode(description))


@contextmanager
def shared_weights(
    directory: Path, device: torch.device | str
) -> Iterator[list[tuple[str, Tensor]]]:
    """Names and tensors that a rank on this device has told of in that folder; to be copied.

    Raises ValueError for memory that has not what was told, OSError if none was told of, and
    RuntimeError if CUDA can't open it.
    """
    device = torch.device(device)
    file = _file(directory, _id_of(device))
    description = msgspec.json.decode(file.read_bytes(), type=_Description)
    flat = _opened(description, file, device)
    try:
        if (found := _checksum(flat)) != description.checksum:
            raise ValueError(f"{file} tells of checksum {description.checksum}, and it is {found}")
        yield [(part.name, _part_of(flat, part)) for part in description.parts]
    finally:
        del flat
        if device.type != _CPU:
            release(device)


def _opened(description: _Description, file: Path, device: torch.device) -> Tensor:
    size = description.num_bytes
    if description.cuda is None:
        return torch.from_file(
            str(file.with_suffix(".bin")), shared=True, size=size, dtype=torch.uint8
        )
    cuda = description.cuda
    index = torch.cuda.current_device() if device.index is None else device.index
    opened: Tensor = _untyped.rebuild_cuda_tensor(
        Tensor, (size,), (1,), 0, torch.storage.TypedStorage, torch.uint8, index, cuda.handle,
        cuda.size_bytes, cuda.offset_bytes, False, cuda.ref_counter_handle,
        cuda.ref_counter_offset, cuda.event_handle, cuda.event_sync_required,
    )  # fmt: skip
    return opened


def release(device: torch.device) -> None:
    """A GPU's memory that was shared, and that nobody has any more, is free then."""
    torch.cuda.synchronize(device)
    cuda: Any = torch.cuda
    cuda.ipc_collect()


def _part_of(flat: Tensor, part: _Part) -> Tensor:
    dtype: torch.dtype = getattr(torch, part.dtype)
    return flat[part.start : part.start + part.num_bytes].view(dtype).view(part.shape)


def _checksum(flat: Tensor) -> int:
    """The sum of its words, as `flash.worker.checksum` of files: against what is old or cut."""
    return int(flat.view(torch.int64).sum())


def _file(directory: Path, device_id: str) -> Path:
    return directory / f"{device_id}.json"


def _id_of(device: torch.device) -> str:
    """The same for all processes that see this device, by whatever number."""
    if device.type == _CPU:
        return _CPU
    return f"gpu-{torch.cuda.get_device_properties(device).uuid}"
