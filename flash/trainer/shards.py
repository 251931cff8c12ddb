"""What training has gathered, each rank its shards, in a folder of torch.distributed.checkpoint.

save_shards  each rank writes what it holds, and nobody holds more
load_shards  each rank reads what it shall hold: there may be another number of ranks
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

_WEIGHTS, _GATHERED, _UPDATES = "weights", "optimizer", "updates"


def save_shards(
    directory: Path, module: nn.Module, optimizer: Optimizer, *, updates: int, weights: bool = False
) -> None:
    """Write what an optimizer has gathered, and its steps so far; a collective.

    `weights`: those of the module too.
    """
    state: dict[str, Any] = {_UPDATES: torch.tensor(updates)}
    if weights:
        state[_WEIGHTS] = get_model_state_dict(module)
    if optimizer.state:
        # Asked before its first step, torch would make it take one of nothing, which counts.
        state[_GATHERED] = get_optimizer_state_dict(module, optimizer)["state"]
    save(state, storage_writer=FileSystemWriter(directory))


def load_shards(directory: Path, module: nn.Module, optimizer: Optimizer) -> int:
    """Go on from there with the optimizer's present settings; its steps so far. A collective."""
    reader = FileSystemReader(directory)
    kept = {name.partition(".")[0] for name in reader.read_metadata().state_dict_metadata}
    updates = torch.tensor(0)
    state: dict[str, Any] = {_UPDATES: updates}
    if _WEIGHTS in kept:
        state[_WEIGHTS] = get_model_state_dict(module)
    if _GATHERED in kept:
        gathered = get_optimizer_state_dict(module, optimizer)  # of a step of nothing, to be filled
        state[_GATHERED] = gathered["state"]
    load(state, storage_reader=reader)
    if _WEIGHTS in kept:
        set_model_state_dict(module, state[_WEIGHTS])
    if _GATHERED in kept:
        set_optimizer_state_dict(module, optimizer, gathered)
    return int(updates)
