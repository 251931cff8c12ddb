"""`flash export`: a checkpoint as a Hugging Face folder, as `save_pretrained` would write it.

    policy/, the ranks' shards ──────────► tensor by tensor ─► a file is full? write it, forget it
    the first model, and adapters in model/ ─► merged ───┘

In one process, which holds no more than a file of it, and the model that adapters belong to.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import StateDictSplit, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from flash.trainer.checkpoint import (
    ADAPTERS_FILE,
    MODEL_FOLDER,
    POLICY_FOLDER,
    checkpoint_version,
)
from flash.trainer.export import gathered, layout, on_its_own, whole_tensors
from flash.trainer.lora import adapted_model
from flash.trainer.model_files import empty_model, read_config
from flash.trainer.save import save_beside
from flash.trainer.shards import weight_reader

_FILE_BYTES = 5 * 10**9  # as transformers' files


def export_model(
    checkpoint: Path, directory: Path, *, dtype: str, file_bytes: int = _FILE_BYTES
) -> None:
    """Writes the model of a checkpoint, adapters merged, into a folder that is not there yet.

    Args:
        dtype: float32, as they are trained, or bfloat16; buffers stay as they are.
        file_bytes: of a file at most, but for a tensor that is larger.

    The folder has its name when it is whole. ValueError if the checkpoint is not whole, or the
    model that its adapters belong to is not there.
    """
    checkpoint_version(checkpoint)
    wanted: torch.dtype = getattr(torch, dtype)
    beside = checkpoint / MODEL_FOLDER
    if (beside / ADAPTERS_FILE).exists():
        model, whole = adapted_model(beside), gathered
    else:
        model = empty_model(read_config(str(beside)), torch.float32)
        whole = partial(_read, weight_reader(checkpoint / POLICY_FOLDER))
    making = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        planned = split_torch_state_dict_into_shards(
            {
                name: torch.empty(shape, dtype=of, device="meta")
                for name, of, shape in layout(model, wanted)
            },
            max_shard_size=file_bytes,
        )
        _write_files(whole_tensors(model, wanted, whole), planned, making)
        if planned.is_sharded:
            index = {"metadata": planned.metadata, "weight_map": planned.tensor_to_filename}
            (making / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        model.config.dtype = wanted
        model.config.save_pretrained(making)
        save_beside(model, making, source=str(beside))
        making.rename(directory)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _write_files(
    tensors: Iterable[tuple[str, Tensor]], planned: StateDictSplit, directory: Path
) -> None:
    """Each as soon as all of it is there."""
    pending: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors:
        file = planned.tensor_to_filename[name]
        pending[file][name] = on_its_own(tensor)
        if len(pending[file]) == len(planned.filename_to_tensors[file]):
            save_file(pending.pop(file), directory / file, metadata={"format": "pt"})


def _read(
    read: Callable[[str, Tensor], Tensor], model: Any, name: str, like: Tensor, wanted: torch.dtype
) -> Tensor:
    """A tensor of the model that ranks trained."""
    return read(f"model.{name}", like).to(wanted)
