"""Attention of many requests in one step, each for itself.

transformers' own way without a flash kernel is one masked product between all tokens of all
requests of a step. Its cost grows with the square of their number: at 64 requests of 100 tokens it
took 80% of the time on a CPU (`benchmarks/worker.py`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type

NAME = "each_request_for_itself"
_EVERYTHING = "full_attention"


def use(model: Any) -> None:
    """Switch the model, before its first step, if the cache keeps everything for every layer.

    For a layer with a window it keeps no more than that, and transformers' own way knows of it.
    Only on a CPU: a GPU prefers one large product to many small ones.
    """
    kept = group_layers_by_attn_type(model.config.get_text_config())
    if model.device.type == "cpu" and kept.keys() == {_EVERYTHING}:
        AttentionInterface.register(NAME, _attend)
        model.set_attn_implementation(NAME)


def _attend(
    module: Any,
    query_1HQD: Tensor,
    key_1GQD: Tensor,
    value_1GQD: Tensor,
    attention_mask: Tensor | None,
    *,
    cache: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """H query heads, G key heads, Q new tokens of all requests, K tokens with those of the cache.

    The tokens of a request follow each other in both.
    """
    if sliding_window is not None:
        raise ValueError(
            f"{type(module).__name__} has a sliding_window={sliding_window}, but its config.json "
            f"says so for no layer: correct layer_types"
        )
    key_1GKD, value_1GKD = cache.update(
        key_states=key_1GQD, value_states=value_1GQD, layer_idx=module.layer_idx, kwargs=kwargs
    )
    q_lengths = kwargs["cu_seq_lens_q"].diff().tolist()
    k_lengths = kwargs["cu_seq_lens_k"].diff().tolist()
    parts = zip(
        query_1HQD.split_with_sizes(q_lengths, 2),
        key_1GKD.split_with_sizes(k_lengths, 2),
        value_1GKD.split_with_sizes(k_lengths, 2),
        strict=True,
    )
    attended = [
        scaled_dot_product_attention(
            query, key, value, **_causality(query, key), scale=scaling, enable_gqa=True
        )
        for query, key, value in parts
    ]
    return torch.cat(attended, dim=2).transpose(1, 2), None


def _causality(query: Tensor, key: Tensor) -> dict[str, Any]:
    """The last query goes with the last key; `is_causal` alone would align the first ones."""
    q_length, k_length = query.shape[2], key.shape[2]
    if q_length in (1, k_length):
        return {"is_causal": q_length > 1}
    mask = torch.ones(q_length, k_length, dtype=torch.bool, device=query.device)
    return {"attn_mask": mask.tril(k_length - q_length)}
