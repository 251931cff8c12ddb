"""Attention of many requests in one step, each for itself.

    on a CPU                ─► one call of the fused kernel a request
    on a GPU, in half precision
        all layers see all  ─► keys and values are read where they lie, by `paged` and `pages`
        some have windows   ─► they are gathered for torch's kernel for many lengths
    elsewhere               ─► transformers' own: one masked product of all with all

The last costs the square of the tokens: at 64 requests of 100 tokens it took 80% of the time on a
CPU (`benchmarks/worker.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.generation.continuous_batching.cache import group_layers_by_attn_type
from transformers.generation.continuous_batching.utils import find_head_dim

from flash.trainer.attention import VarlenKernel, capability_of, takes_varlen, varlen_kernel
from flash.trainer.fused import can_fuse, fuse_layers
from flash.worker.pages import step_by_pages

ONE_BY_ONE = "each_request_for_itself"
BY_KERNELS = "by_kernels_for_many_lengths"
_EVERYTHING = "full_attention"


@dataclass(frozen=True, slots=True)
class GpuKernels:
    """`paged` is `flash.worker.paged.attend_in_pages`."""

    varlen: VarlenKernel
    paged: Callable[..., Tensor]


def use(model: Any, manager: Any, *, longest: int, graphs: bool) -> None:
    """Switch a model to what serves it best, before its manager is started: the probe that follows
    each publish compares what it then computes with the trainer.

    `longest` is the most tokens that a request may have; `graphs`: whether steps may be CUDA
    graphs, in which nothing of the model's is called.
    """
    if model.device.type == "cpu":
        # For a layer with a window the cache keeps no more than that, and transformers' way knows.
        if _kinds(model) == {_EVERYTHING}:
            AttentionInterface.register(ONE_BY_ONE, _attend_one_by_one)
            model.set_attn_implementation(ONE_BY_ONE)
        return
    if can_fuse(model):
        fuse_layers(model)
    if (kernels := _kernels_for(model)) is not None:
        use_kernels(model, manager, kernels, longest=longest, graphs=graphs)
    elif model.device.type == "cuda":
        # cuDNN's kernel plans anew for each length, which takes 70 ms.
        torch.backends.cuda.enable_cudnn_sdp(False)


def use_kernels(
    model: Any, manager: Any, kernels: GpuKernels, *, longest: int, graphs: bool
) -> None:
    """As `use`, with these kernels."""

    def attend(*tensors: Any, **settings: Any) -> tuple[Tensor, None]:
        return _attend_by_kernels(kernels, *tensors, **settings)

    AttentionInterface.register(BY_KERNELS, attend)
    model.set_attn_implementation(BY_KERNELS)
    if _kinds(model) == {_EVERYTHING}:
        step_by_pages(manager, longest=longest, graphs=graphs)
    else:
        # By itself transformers makes graphs with flash-attn's kernels only.
        manager.continuous_batching_config.use_cuda_graph = (graphs, False)
        manager.warmup()


def _kernels_for(model: Any) -> GpuKernels | None:
    config = model.config.get_text_config()
    width = find_head_dim(config)
    if not takes_varlen(
        capability=capability_of(model.device),
        dtype=model.dtype,
        width=width,
        value_width=getattr(config, "v_head_dim", width),
    ):
        return None
    from flash.worker.paged import attend_in_pages  # noqa: PLC0415 (only CUDA's torch has triton)

    return GpuKernels(varlen_kernel(), attend_in_pages)


def _kinds(model: Any) -> set[str]:
    return set(group_layers_by_attn_type(model.config.get_text_config()))


def _attend_by_kernels(
    kernels: GpuKernels,
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
    """As `_attend_one_by_one`."""
    allocator = cache.layer_to_allocator[module.layer_idx]
    if allocator.layer_type == _EVERYTHING:
        _refuse_window(module, sliding_window)
    key_1GKD, value_1GKD = cache.update(
        key_states=key_1GQD, value_states=value_1GQD, layer_idx=module.layer_idx, kwargs=kwargs
    )
    if kwargs.get("block_table") is None:
        return kernels.varlen.attend_to_more(
            query_1HQD, key_1GKD, value_1GKD,
            (kwargs["cu_seq_lens_q"], kwargs["max_length_q"]),
            (kwargs["cu_seq_lens_k"], kwargs["max_length_k"]),
            scaling=scaling, sliding_window=sliding_window,
        ), None  # fmt: skip
    query_QHD, key_QGD, value_QGD = (
        tensor[0].transpose(0, 1) for tensor in (query_1HQD, key_1GQD, value_1GQD)
    )
    attended_QHD = kernels.paged(
        query_QHD, key_QGD, value_QGD,
        keys=kwargs["k_cache"], values=kwargs["v_cache"], pages=kwargs["block_table"],
        queries=kwargs["cu_seq_lens_q"],
        ends=kwargs["cu_seq_lens_k"], unused=allocator.write_trash_index,
        scale=scaling or query_QHD.shape[-1] ** -0.5,
    )  # fmt: skip
    return attended_QHD[None], None


def _attend_one_by_one(
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
    _refuse_window(module, sliding_window)
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


def _refuse_window(module: Any, sliding_window: int | None) -> None:
    if sliding_window is not None:
        raise ValueError(
            f"{type(module).__name__} has a sliding_window={sliding_window}, but its config.json "
            f"says so for no layer: correct layer_types"
        )
