"""What training has gathered, each rank its shards, in a folder of torch.distributed.checkpoint.

shards_of      what a rank holds; a copy of it may be written while training goes on
load_shards    each rank reads what it shall hold: there may be another number of ranks
weight_reader  weights one by one, whole, for a process without ranks
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer

_WEIGHTS, _GATHERED, _UPDATES = "weights", "optimizer", "updates"


def shards_of(
    module: nn.Module, optimizer: Optimizer, *, updates: int, weights: bool = True
) -> dict[str, Any]:
    """What a rank holds of what an optimizer has gathered, of its steps so far, and with `weights`
    of the module: no copy. A collective."""
    # After a forward pass alone the root's weights are still gathered, and none of the optimizer's.
    sharded: Any = module
    sharded.reshard()
    state: dict[str, Any] = {_UPDATES: torch.tensor(updates)}
    if weights:
        state[_WEIGHTS] = _weights(module)
    if optimizer.state:
        # Asked before its first step, torch would make it take one of nothing, which counts.
        state[_GATHERED] = get_optimizer_state_dict(module, optimizer)["state"]
    return state


def load_shards(directory: Path, module: nn.Module, optimizer: Optimizer) -> int:
    """Go on from there with the optimizer's present settings; its steps so far. A collective."""
    reader = _ReadOnce(directory)
    kept = {name.partition(".")[0] for name in reader.read_metadata().state_dict_metadata}
    updates = torch.tensor(0)
    state: dict[str, Any] = {_UPDATES: updates}
    if _WEIGHTS in kept:
        state[_WEIGHTS] = _weights(module)
    if _GATHERED in kept:
        gathered = get_optimizer_state_dict(module, optimizer)  # of a step of nothing, to be filled
        state[_GATHERED] = gathered["state"]
    load(state, storage_reader=reader)  # into the weights themselves
    if _GATHERED in kept:
        set_optimizer_state_dict(module, optimizer, gathered)
    return int(updates)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and the buffers that count."""
    once = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    return {name: tensor for name, tensor in module.state_dict().items() if name in once}


class _ReadOnce(FileSystemReader):
    """Where all is, of many ranks, takes seconds to read; it stays."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._metadata = super().read_metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


def weight_reader(directory: Path) -> Callable[[str, Tensor], Tensor]:
    """Reads a weight of the module by its name, whole, for a process without ranks; in the shape
    and dtype of a tensor that may be on torch's meta device."""
    reader = _ReadOnce(directory)

    def read(name: str, like: Tensor) -> Tensor:
        whole = torch.empty_like(like, device="cpu")
        with warnings.catch_warnings(action="ignore"):  # that there are no ranks
            load({_WEIGHTS: {name: whole}}, storage_reader=reader, no_dist=True)
        return whole

    return read
