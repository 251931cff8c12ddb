"""Models as the ranks hold them: loaded for packed sequences, sharded with FSDP2, optimized."""

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from flash.trainer.attention import PACKED_ATTENTION
from flash.trainer.config import TrainerConfig

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on rank 0

# Below it one FSDP unit is faster than one a layer: gathering small layers is all overhead.
_ONE_UNIT_PARAMETERS = 50_000_000


def load_model(source: str) -> Any:
    """The causal language model, in float32, without dropout."""
    # Weights and optimizer are float32 everywhere; on a GPU layers compute in bfloat16.
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation=PACKED_ATTENTION
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # or logprobs would differ between two looks at the same weights
    return model


def shard(module: nn.Module, model: Any, *, ranks: int, half: bool) -> None:
    """Shards `module` over all ranks, and the layers that `model` names in it, if it is large."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
    )
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (ranks,))
    if sum(p.numel() for p in module.parameters()) > _ONE_UNIT_PARAMETERS:
        for layer in module.modules():
            if type(layer).__name__ in (model._no_split_modules or ()):
                fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def make_optimizer(
    module: nn.Module, config: TrainerConfig, *, learning_rate: float
) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        module.parameters(),
        lr=learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )


def load_optimizer(
    module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Goes on from what an optimizer has gathered; its settings stay the present ones."""
    settings = [
        {name: value for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    set_optimizer_state_dict(module, optimizer, optim_state_dict=state, options=WHOLE)
    for group, present in zip(optimizer.param_groups, settings, strict=True):
        group.update(present)


def clip_gradient(module: nn.Module, config: TrainerConfig) -> float:
    """Clips it over all ranks; its norm before."""
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
