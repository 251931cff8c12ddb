"""The tensors of files, in chunks and as words."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

Chunk = dict[str, Tensor]

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tensors_in(directory: Path) -> dict[str, Tensor]:
    """Of its safetensors, mapped and not read; ValueError if it has no such files."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no safetensors in {directory}: were these weights replaced already?")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors |= load_file(file)
    return tensors


def chunks_of(directory: Path, chunk_bytes: int) -> list[Chunk]:
    """The tensors in a directory in chunks of at most `chunk_bytes`.

    A larger tensor is a chunk by itself. One dtype a chunk, because servers view each tensor where
    it lies, and float32 may not lie behind an odd number of bfloat16.
    """
    chunks: list[Chunk] = []
    size, dtype = 0, None
    for name, tensor in tensors_in(directory).items():
        if not chunks or tensor.dtype != dtype or size + tensor.nbytes > chunk_bytes:
            chunks.append({})
            size, dtype = 0, tensor.dtype
        chunks[-1][name] = tensor
        size += tensor.nbytes
    return chunks


def words_of(tensor: Tensor) -> Tensor:
    """Values as integers of their size, flat; of a contiguous tensor it is a view."""
    return tensor.contiguous().view(-1).view(_WORDS[tensor.element_size()])
