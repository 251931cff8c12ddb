"""A reference in the place of torch's kernel for many lengths, which only GPUs have."""

import itertools

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's kernel says that it computes: the last query goes with the last key."""
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError("more heads of queries than of keys")
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    attended = torch.full_like(query, float("nan"))
    parts = zip(
        itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True
    )
    for (start, end), (first, last) in parts:
        queries, keys = end - start, last - first
        assert queries <= min(keys, max_q) and keys <= max_k
        behind = keys - queries
        allowed = torch.ones(queries, keys, dtype=torch.bool)
        if window_size[0] >= 0:
            allowed = allowed.triu(behind - window_size[0])
        if window_size[1] >= 0:
            allowed = allowed.tril(behind + window_size[1])
        one = scaled_dot_product_attention(
            query[start:end].transpose(0, 1)[None],
            *(tensor[first:last].transpose(0, 1)[None] for tensor in (key, value)),
            attn_mask=allowed, scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
        attended[start:end] = one[0].transpose(0, 1)
    return attended
