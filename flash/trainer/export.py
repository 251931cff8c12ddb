"""A sharded model's weights on their way to the workers: gathered one by one, written by the file.

    for each tensor: all ranks gather it ─► one keeps it ─► a file's worth? write it, forget it

What is written is a Hugging Face checkpoint without tokenizer: names and parts as there, tied
weights once, adapters merged into the weights that they belong to.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from flash.trainer.lora import is_adapter, merged, own_name
from flash.trainer.stored import as_stored, parts_of

_FILE_BYTES = 1 << 30
_INDEX_FILE = "model.safetensors.index.json"


def write_weights(
    model: Any, directory: Path, *, dtype: torch.dtype, write: bool, file_bytes: int = _FILE_BYTES
) -> None:
    """Write the parameters in `dtype`, and buffers as they are; a collective.

    Ranks with `write` share the work: each writes files of its own; rank 0 is one of them. When it
    returns there, all files are written. With the dtype that the trainer computes in, a worker has
    the very weights that the trainer computed with. Nobody holds more than one whole tensor of the
    model or of its files, a writer up to `file_bytes` more.
    """
    writers = _writers(write)
    bytes_of = dict.fromkeys(writers, 0)
    rank = dist.get_rank()
    writer = _Writer(directory, f"model-{rank:05d}", file_bytes)
    for name, whole in whole_tensors(model, dtype):
        # The same one in each export of this model, so that files can be compared.
        owner = min(writers, key=bytes_of.__getitem__)
        bytes_of[owner] += whole.nbytes
        if owner == rank:
            writer.add(name, whole)
        del whole
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.gather_object(writer.close(), of_ranks if rank == 0 else None)
    if rank == 0:
        places = {name: file for files in of_ranks for name, file in files.items()}
        index = {"metadata": {}, "weight_map": places}
        (directory / _INDEX_FILE).write_text(json.dumps(index))
        model.config.save_pretrained(directory)


def _writers(write: bool) -> list[int]:
    """The ranks that write."""
    each: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(each, write)
    return [rank for rank, writes in enumerate(each) if writes]


Whole = Callable[[Any, str, Tensor, torch.dtype], Tensor]
"""Of a model, a parameter's or buffer's name, what it holds of it, and a dtype: the whole of it."""


def gathered(model: Any, name: str, tensor: Tensor, wanted: torch.dtype) -> Tensor:
    """A tensor of a model that is here, with what its adapter adds; a collective of all ranks."""
    # Cast first: the gather then moves what is wanted and no more.
    own = merged(model, name, tensor).to(wanted)
    return own.full_tensor() if isinstance(own, DTensor) else own


def whole_tensors(
    model: Any, dtype: torch.dtype, whole: Whole = gathered
) -> Iterator[tuple[str, Tensor]]:
    """Those that `write_weights` writes, one by one, on the device, as `whole` has them."""
    exported = {own_name(each[0]): each for each in _exported(model, dtype)}
    for part in parts_of(model, exported):
        yield from as_stored(model, {own: whole(model, *exported[own]) for own in part}).items()


def layout(model: Any, dtype: torch.dtype) -> list[tuple[str, torch.dtype, torch.Size]]:
    """Their names, dtypes and shapes."""

    def empty(model: Any, name: str, tensor: Tensor, wanted: torch.dtype) -> Tensor:
        return torch.empty(tensor.shape, dtype=wanted, device="meta")

    return [(name, t.dtype, t.shape) for name, t in whole_tensors(model, dtype, empty)]


def _exported(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, torch.dtype]]:
    """What each is now, and the dtype that it gets: parameters that, buffers their own."""
    tied = set(model.all_tied_weights_keys)
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in model.state_dict().items():
        if name not in tied and not is_adapter(name):
            yield name, tensor, dtype if name in parameters else tensor.dtype


def on_its_own(tensor: Tensor) -> Tensor:
    """In host memory, as a file has it; a part keeps nothing of the whole that it is of."""
    own = tensor.contiguous().cpu()
    return own.clone() if own.untyped_storage().nbytes() > own.nbytes else own


class _Writer:
    """Fills one file after the other, whose names begin alike."""

    def __init__(self, directory: Path, prefix: str, file_bytes: int) -> None:
        self._directory = directory
        self._prefix = prefix
        self._file_bytes = file_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: dict[str, str] = {}
        self._written = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self._file_bytes:
            self._flush()
        self._pending[name] = on_its_own(tensor)
        self._pending_bytes += tensor.nbytes

    def close(self) -> dict[str, str]:
        """Each tensor's file."""
        if self._pending:
            self._flush()
        return self._files

    def _flush(self) -> None:
        self._written += 1
        file = f"{self._prefix}-{self._written:05d}.safetensors"
        save_file(self._pending, self._directory / file, metadata={"format": "pt"})
        self._files |= dict.fromkeys(self._pending, file)
        self._pending, self._pending_bytes = {}, 0
