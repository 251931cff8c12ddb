"""Models as the ranks hold them: loaded for packed sequences, sharded with FSDP2."""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM

from flash.trainer.scorer import PACKED_ATTENTION

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
