"""How many tokens a forward and backward pass has memory for, on a GPU."""

import torch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from flash.trainer.config import TOKENS_OF_PASS
from flash.trainer.scorer import TokenScorer

_MEASURED = (512, 1536)  # tokens
_SCORED = 64
# What a step needs besides activations: of a parameter its gradient and Adam's state in float32,
# itself and its gradient in bfloat16; of a chunk's logit what its loss makes of it.
_GRADIENT_BYTES, _STATE_BYTES, _HALF_BYTES, _LOGIT_BYTES = 4, 8, 4, 32
_SHARE = 0.7  # of what is left: the backward pass has activations of its own, the memory has gaps
_STEP = 1024
_MOST = 32_768  # with twice as many a step of a model of 0.5 billion took as long


def tokens_with_room(scorer: TokenScorer, optimizer: Optimizer, *, models: int = 1) -> int:
    """Multiples of 1024; on a CPU as many as are usual. A collective of all ranks.

    With a critic there are two `models` of this size that a step trains. Gradients are forgotten.
    """
    device = next(scorer.parameters()).device
    if device.type != "cuda":
        return TOKENS_OF_PASS
    first, second = (_kept_bytes(scorer, device, tokens) for tokens in _MEASURED)
    each = (second - first) / (_MEASURED[1] - _MEASURED[0])
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return tokens_that_fit(free - models * _to_come(scorer, optimizer), each)


def tokens_that_fit(free_bytes: float, token_bytes: float) -> int:
    """So many tokens of that much memory, but as few and as many as make sense."""
    tokens = int(_SHARE * free_bytes / token_bytes) // _STEP * _STEP
    return min(max(tokens, _STEP), _MOST)


def _kept_bytes(scorer: TokenScorer, device: torch.device, tokens: int) -> int:
    """What a forward pass of so many tokens keeps for its backward pass."""
    token_ids_N = torch.zeros(tokens, dtype=torch.long, device=device)
    scored_T = torch.arange(tokens - _SCORED, tokens, device=device)
    with torch.enable_grad():
        logprobs_T = scorer(token_ids_N, (tokens,), scored_T)
    kept = torch.cuda.memory_allocated(device)
    logprobs_T.sum().backward()  # what is kept is freed, and the weights are sharded again
    for parameter in scorer.parameters():
        parameter.grad = None
    return kept


def _to_come(scorer: TokenScorer, optimizer: Optimizer) -> int:
    """Bytes that the first step takes for good, or for a while besides activations."""
    parameters = list(scorer.parameters())
    own = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    kept = own * (_GRADIENT_BYTES + (0 if optimizer.state else _STATE_BYTES))
    whole = sum(p.numel() for p in parameters) * _HALF_BYTES
    return kept + whole + scorer.kept_logits * _LOGIT_BYTES
