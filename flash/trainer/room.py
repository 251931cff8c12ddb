"""How many tokens a forward and backward pass has memory for, on a GPU."""

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from flash.trainer.layers import decoder_layers, keep_activations, recompute_activations
from flash.trainer.memory import (
    FLOAT32_BYTES,
    GATHERED_LAYERS,
    HALF_BYTES,
    MOMENTS_BYTES,
    SENT_LAYERS,
)
from flash.trainer.offload import memory_of
from flash.trainer.passes import Room
from flash.trainer.scorer import TokenScorer

_MEASURED = (512, 1536)  # tokens
_SCORED = 64
LOGIT_BYTES = 32  # of a chunk's logit what its loss makes of it
_SHARE = 0.7  # of what is left: the backward pass has activations of its own, the memory has gaps
_STEP = 1024


def room_of(
    scorer: TokenScorer,
    optimizer: Optimizer,
    *,
    recomputed: bool | None,
    models: int = 1,
    alone: bool = False,
) -> Room | None:
    """In multiples of 1024; None on a CPU, where it is not measured. A collective of all ranks.

    With a critic there are two `models` of this size that a step trains. Gradients are forgotten.
    `recomputed`: as is configured, and as the model is, None if it is left to what is found here;
    what is not asked for is not measured. `alone`: as if nobody else had any of the GPU's memory.
    """
    device = next(scorer.parameters()).device
    if device.type != "cuda":
        return None
    model: Any = scorer.model
    layers = len(decoder_layers(model))
    if recomputed:
        keep_activations(model)
    each = kept_each = _kept_of_token(scorer, device)
    if layers and recomputed is not False:
        recompute_activations(model)
        # The backward pass has one layer's at a time.
        each = _kept_of_token(scorer, device) + kept_each / layers
        if not recomputed:
            keep_activations(model)
    if alone:
        # Nothing is given back: a vLLM server that starts on the card fails if more is free after
        # its own measurement than before (v1/worker/gpu_worker.py).
        _, total = torch.cuda.mem_get_info(device)
        free = total - torch.cuda.memory_allocated(device)
    else:
        free, _ = memory_of(device)
    left = free - models * to_come(scorer, optimizer)
    return Room(tokens_that_fit(left, kept_each), tokens_that_fit(left, each))


def tokens_that_fit(free_bytes: float, token_bytes: float) -> int:
    """So many tokens of that much memory, but as few as make sense."""
    tokens = int(_SHARE * free_bytes / token_bytes) // _STEP * _STEP
    return max(tokens, _STEP)


def _kept_of_token(scorer: TokenScorer, device: torch.device) -> float:
    first, second = (_kept_bytes(scorer, device, tokens) for tokens in _MEASURED)
    return (second - first) / (_MEASURED[1] - _MEASURED[0])


def _kept_bytes(scorer: TokenScorer, device: torch.device, tokens: int) -> int:
    """What a forward pass of so many tokens a rank keeps for its backward pass."""
    of_all = tokens if scorer.group is None else tokens * scorer.group.size
    token_ids_N = torch.zeros(of_all, dtype=torch.long, device=device)
    scored_T = torch.arange(of_all - _SCORED, of_all, device=device)
    with torch.enable_grad():
        logprobs_T = scorer(token_ids_N, (of_all,), scored_T)
    kept = torch.cuda.memory_allocated(device)
    logprobs_T.sum().backward()  # what is kept is freed, and the weights are sharded again
    for parameter in scorer.parameters():
        parameter.grad = None
    return kept


def to_come(scorer: TokenScorer, optimizer: Optimizer) -> int:
    """Bytes that the first step takes for good, or for a while besides activations.

    Of a parameter its gradient and Adam's moments; of what is gathered at a time itself and its
    gradient in bfloat16. That is the whole model if it is one unit of FSDP, else embedding and
    head, and a layer with those beside it.
    """
    trained = [p for p in scorer.parameters() if p.requires_grad]
    own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in trained)
    kept = own * (FLOAT32_BYTES + (0 if optimizer.state else MOMENTS_BYTES))
    whole: nn.Module = scorer
    units = (m for m in whole.modules() if isinstance(m, FSDPModule) and m is not whole)
    layers = [_numbers(unit) for unit in units]
    root, root_trained = (n - sum(of) for n, *of in zip(_numbers(scorer), *layers, strict=True))
    layer, layer_trained = max(layers, default=(0, 0))
    gathered = HALF_BYTES * (root + GATHERED_LAYERS * layer)
    sent = HALF_BYTES * root_trained + (HALF_BYTES + SENT_LAYERS * FLOAT32_BYTES) * layer_trained
    all_of_it: int = kept + gathered + sent + scorer.kept_logits * LOGIT_BYTES
    return all_of_it


def _numbers(module: nn.Module) -> tuple[int, int]:
    """How many parameters it has, and how many of them are trained: on all ranks."""
    parameters = list(module.parameters())
    return (
        sum(p.numel() for p in parameters),
        sum(p.numel() for p in parameters if p.requires_grad),
    )
