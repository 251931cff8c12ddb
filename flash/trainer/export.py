"""A sharded model's weights on their way to the workers: gathered one by one, written by the file.

    for each tensor: all ranks gather it ─► rank 0 keeps it ─► a file's worth? write it, forget it

What is written is a Hugging Face checkpoint without tokenizer: names as there, tied weights once,
and apart what is apart there. In memory a layer's experts are one tensor; in files each has its
own, and servers look for those.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

_FILE_BYTES = 1 << 30
_INDEX_FILE = "model.safetensors.index.json"


def write_weights(
    model: Any, directory: Path, *, dtype: torch.dtype, write: bool, file_bytes: int = _FILE_BYTES
) -> None:
    """Write the parameters in `dtype`, and buffers as they are; a collective, rank 0 has `write`.

    With the dtype that the trainer computes in, a worker has the very weights that the trainer
    computed with. Nobody holds more than one whole tensor of the model or of its files, the writer
    up to `file_bytes` more.
    """
    writer = _Writer(directory, file_bytes)
    for name, whole in whole_tensors(model, dtype):
        if write:
            writer.add(name, whole)
        del whole
    if write:
        writer.close()
        model.config.save_pretrained(directory)


def whole_tensors(model: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Those that `write_weights` writes, one by one, on the device; a collective of all ranks."""
    for part in _exported(model, dtype):
        # Cast first: the gather then moves what is wanted and no more.
        whole = {name: _gather(tensor.to(wanted)) for name, (tensor, wanted) in part.items()}
        yield from _as_in_files(model, whole).items()


def layout(model: Any, dtype: torch.dtype) -> list[tuple[str, torch.dtype, torch.Size]]:
    """Their names, dtypes and shapes."""
    return [
        (name, empty.dtype, empty.shape)
        for part in _exported(model, dtype)
        for name, empty in _as_in_files(
            model,
            {
                name: torch.empty(tensor.shape, dtype=wanted, device="meta")
                for name, (tensor, wanted) in part.items()
            },
        ).items()
    ]


def _exported(model: Any, dtype: torch.dtype) -> Iterator[dict[str, tuple[Tensor, torch.dtype]]]:
    """What each is now, and the dtype that it gets: parameters that, buffers their own. Together
    are those that files hold as one."""
    tied = set(model.all_tied_weights_keys)
    parameters = {name for name, _ in model.named_parameters()}
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    for names in _parts(model, tensors):
        yield {
            name: (tensors[name], dtype if name in parameters else tensors[name].dtype)
            for name in names
        }


def _parts(model: Any, names: Iterable[str]) -> list[list[str]]:
    """The model's names, those together that are one tensor in its files."""
    # What its own files needed, as transformers knows after it has read them.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    reverse: list[Any] = [conversion.reverse_transform() for conversion in conversions[::-1]]
    renamings = [each for each in reverse if isinstance(each, WeightRenaming)]
    converters = [each for each in reverse if isinstance(each, WeightConverter)]
    parts: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts[rename_source_key(name, renamings, converters, reverse=True)[0]].append(name)
    return list(parts.values())


def _as_in_files(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names, and in the parts, that `save_pretrained` would write."""
    untyped_revert: Any = revert_weight_conversion
    stored: dict[str, Tensor] = untyped_revert(model, tensors)
    return stored


def _gather(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class _Writer:
    """Fills one file after the other."""

    def __init__(self, directory: Path, file_bytes: int) -> None:
        self._directory = directory
        self._file_bytes = file_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: dict[str, str] = {}
        self._written = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_bytes + tensor.nbytes > self._file_bytes:
            self._flush()
        self._pending[name] = tensor.contiguous().cpu()
        self._pending_bytes += tensor.nbytes

    def close(self) -> None:
        self._flush()
        index = {"metadata": {}, "weight_map": self._files}
        (self._directory / _INDEX_FILE).write_text(json.dumps(index))

    def _flush(self) -> None:
        self._written += 1
        file = f"model-{self._written:05d}.safetensors"
        save_file(self._pending, self._directory / file, metadata={"format": "pt"})
        self._files |= dict.fromkeys(self._pending, file)
        self._pending, self._pending_bytes = {}, 0
