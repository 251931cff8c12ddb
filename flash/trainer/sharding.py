"""Models as the ranks hold them: sharded with FSDP2, optimized."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from flash.system.heap import give_large_blocks_back
from flash.trainer.config import TrainerConfig
from flash.trainer.memory import HALF_BYTES, TRAINED_BYTES

# Below it one FSDP unit is faster than one a layer: gathering small layers is all overhead.
_ONE_UNIT_PARAMETERS = 50_000_000
# A GPU alone has nobody to gather from, and units of layers cost it three quarters of what a pass
# costs the CPU. In one unit a parameter takes, at most: itself, its gradient and Adam's state in
# float32, itself and its gradient in bfloat16, and the gradient on its way between the two.
_ONE_UNIT_BYTES = TRAINED_BYTES + 2 * HALF_BYTES + 8
_ONE_UNIT_SHARE = 0.6  # of the GPU's memory; activations are gone when it takes most


def shard(
    module: nn.Module, model: Any, *, ranks: int, half: bool, shard_size: int | None = None
) -> None:
    """Shards `module`, and the layers that `model` names in it, if it is large: over all ranks, or
    over groups of `shard_size`, which are those that follow each other; the groups replicate it.

    Either way gradients come to the mean over all ranks.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
    )
    # What `module` is given besides token ids are temperatures, and 0.7 is not 0.69921875.
    outer = replace(policy, cast_forward_inputs=False)
    shard_size = shard_size or ranks
    sizes = (ranks,) if shard_size == ranks else (ranks // shard_size, shard_size)
    names = ("replicate", "shard")[-len(sizes) :]
    mesh = init_device_mesh(
        "cuda" if torch.cuda.is_available() else "cpu", sizes, mesh_dim_names=names
    )
    if sum(p.numel() for p in module.parameters()) > _most_in_one_unit(shard_size):
        give_large_blocks_back()  # in which one layer after the other is gathered
        for layer in divided_layers(module, model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=outer)


def divided_layers(module: nn.Module, model: Any) -> list[nn.Module]:
    """The layers that `model` names in a module: each is gathered by itself, if it is large."""
    return [m for m in module.modules() if type(m).__name__ in (model._no_split_modules or ())]


def _most_in_one_unit(ranks: int) -> float:
    if ranks > 1 or not torch.cuda.is_available():
        return _ONE_UNIT_PARAMETERS
    _, total = torch.cuda.mem_get_info()
    return max(_ONE_UNIT_PARAMETERS, _ONE_UNIT_SHARE * total / _ONE_UNIT_BYTES)


def make_optimizer(
    module: nn.Module, config: TrainerConfig, *, learning_rate: float
) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def clip_gradient(module: nn.Module, config: TrainerConfig) -> float:
    """Clips it over all ranks; its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
