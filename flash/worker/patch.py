"""A delta in the place of whole weights, inside of a vLLM server, by vLLM's own means.

    delta ─► load_checkpoint_weight_patches ─► the model's loader ─► its fused, sharded weights
             read_back ◄── the same loader, which reads where it would write ◄──────┘

What a loader writes elsewhere than in place, or in another layout, is not read as it should be.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.model_executor.model_loader.checkpoint_weight_patch import (
    CheckpointWeightPatch,
    load_checkpoint_weight_patches,
)

from flash.worker.delta import FOLDER, PLACE_BYTES, Had, TensorInfo
from flash.worker.tensors import Chunk, chunks_of, words_of

_CHUNK_BYTES = 256 << 20  # of a delta, and of the whole tensors that are patched at a time


def read(export: Path, device: torch.device) -> Iterator[Chunk]:
    """The delta of an export, chunk by chunk, on the device."""
    for chunk in chunks_of(export / FOLDER, _CHUNK_BYTES):
        yield {name: part.to(device) for name, part in chunk.items()}


def received(
    group: Any, names: Sequence[str], shapes: Sequence[Sequence[int]], device: torch.device
) -> Chunk:
    """A chunk of a delta that the sender broadcasts: bytes of each of these, in order."""
    sizes = [size for (size,) in shapes]
    packed = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    group.broadcast(packed, src=0)
    return dict(zip(names, torch.split_with_sizes(packed, sizes), strict=True))


def apply_delta(model: Any, tensors: Iterable[TensorInfo], chunk: Chunk) -> None:
    """Changes the weights in place by a chunk of a delta, which is on their device.

    Whatever it raises leaves them neither old nor new.
    """
    patches = [_patch(tensor, chunk[tensor.name]) for tensor in tensors if tensor.name in chunk]
    load_checkpoint_weight_patches(
        model, patches, max_chunk_bytes=_CHUNK_BYTES, validate_unique_indices=False
    )


def _patch(tensor: TensorInfo, part: Tensor) -> CheckpointWeightPatch:
    dtype: torch.dtype = getattr(torch, tensor.dtype)
    places_end = tensor.changed * PLACE_BYTES
    values_end = places_end + tensor.changed * dtype.itemsize
    return CheckpointWeightPatch(
        name=tensor.name,
        shape=tuple(tensor.shape),
        dtype=dtype,
        values=part[places_end:values_end].view(dtype),
        indices=part[:places_end].view(torch.int32),
    )


@torch.no_grad()
def read_back(model: Any, tensors: Sequence[TensorInfo], device: torch.device) -> list[Had]:
    """Of each tensor of a checkpoint, what of it is in the model's weights."""
    sources = [
        torch.zeros((), dtype=getattr(torch, tensor.dtype), device=device) for tensor in tensors
    ]
    reading = _Reading(model, sources)
    with reading:
        model.load_weights(
            [
                (tensor.name, source.expand(tensor.shape))
                for tensor, source in zip(tensors, sources, strict=True)
            ]
        )
    sums = torch.stack(reading.sums).tolist()
    return list(zip(reading.values, sums, strict=True))


class _Reading(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, copies from sources into weights read there, and nothing is written."""

    def __init__(self, model: Any, sources: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values = [0] * len(sources)
        self.sums = [torch.zeros((), dtype=torch.int64, device=each.device) for each in sources]
        self._numbers = {_memory(source): number for number, source in enumerate(sources)}
        self._weights = {
            _memory(weight) for weight in (*model.parameters(), *model.buffers()) if weight.numel()
        }

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not (func._schema.is_mutable and args and _memory(args[0]) in self._weights):
            return func(*args, **(kwargs or {}))
        target = args[0]
        if func is torch.ops.aten.copy_.default and target.shape == args[1].shape:
            number = self._numbers.get(_memory(args[1]))
            if number is not None:
                self.values[number] += target.numel()
                # A server may compute in a wider dtype, which has the very value.
                self.sums[number] += words_of(target.to(args[1].dtype)).sum(dtype=torch.int64)
        return target


def _memory(argument: Any) -> int | None:
    """Where a tensor's storage is; None of what is no tensor."""
    return argument.untyped_storage().data_ptr() if isinstance(argument, Tensor) else None
