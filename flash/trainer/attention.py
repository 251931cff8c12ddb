"""Causal attention of packed sequences, each over itself.

    on a GPU, in half precision ─► one call of torch's kernel for sequences of many lengths
    elsewhere                   ─► one call of the fused kernel a sequence

Legend: N tokens of Q sequences, one after the other, without padding; H heads; D width of a head.
"""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from flash.trainer.sequence_parallel import SequenceGroup

PACKED_ATTENTION = (
    "packed_causal"  # transformers takes any name with "flash" in it for FlashAttention
)

# What attention is changed by in some models, and is not done here.
_UNKNOWN_TO_US = ("softcap", "s_aux", "position_bias")

# What torch's kernel takes: widths that are multiples of the first, up to the second.
_WIDTH_STEP, _WIDEST = 8, 256
_OLDEST_GPU = (8, 0)  # compute capability


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the sequences of a forward pass lie; made once, for all its layers.

    `offsets` are their beginnings and the end of the last, int32, [Q + 1], on the tokens' device.
    `group`: the ranks that share the pass, if it is not one rank's.
    """

    lengths: tuple[int, ...]
    longest: int
    offsets: Tensor
    group: SequenceGroup | None = None

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device | str,
        group: SequenceGroup | None = None,
    ) -> Self:
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        return cls(tuple(lengths), max(lengths), offsets, group)


@dataclass(frozen=True, slots=True)
class VarlenKernel:
    """torch's variable-length attention (`torch.nn.attention.varlen`), as much as there is of it.

    `told`: it wants to be told that there are fewer heads of keys than of queries; that of torch
    2.11 takes them, but does not know the word.
    """

    call: Callable[..., Any]
    told: bool

    @classmethod
    def of(cls, call: Callable[..., Any]) -> Self:
        return cls(call, told="enable_gqa" in inspect.signature(call).parameters)

    def attend(
        self,
        query_1HND: Tensor,
        key_1HND: Tensor,
        value_1HND: Tensor,
        packing: Packing,
        *,
        scaling: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """Attention of each sequence over itself, [1, N, H, D]."""
        return self.attend_to_more(
            query_1HND, key_1HND, value_1HND,
            (packing.offsets, packing.longest), (packing.offsets, packing.longest),
            scaling=scaling, sliding_window=sliding_window,
        )  # fmt: skip

    def attend_to_more(
        self,
        query_1HND: Tensor,
        key_1HKD: Tensor,
        value_1HKD: Tensor,
        queries: tuple[Tensor, int],
        keys: tuple[Tensor, int],
        *,
        scaling: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """Attention of the last tokens of each sequence to all of it, [1, N, H, D].

        `queries` and `keys` are offsets and the longest, as of a `Packing`.
        """
        settings: dict[str, Any] = {}
        if self.told and query_1HND.shape[1] != key_1HKD.shape[1]:
            settings["enable_gqa"] = True
        query, key, value = (
            tensor[0].transpose(0, 1).contiguous() for tensor in (query_1HND, key_1HKD, value_1HKD)
        )
        # A model's window counts the token itself, the kernel's those before it; -1 is all of them.
        before = -1 if sliding_window is None else sliding_window - 1
        attended_NHD: Tensor = self.call(
            query, key, value, queries[0], keys[0], queries[1], keys[1],
            scale=scaling, window_size=(before, 0), **settings,
        )  # fmt: skip
        return attended_NHD[None]


def attend_one_by_one(
    query_1HND: Tensor,
    key_1HND: Tensor,
    value_1HND: Tensor,
    packing: Packing,
    *,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """Attention of each sequence over itself, [1, N, H, D], by a call a sequence.

    One call for all, with a mask that keeps the sequences apart, takes 2.5 times as long on a CPU:
    it computes what the mask throws away.
    """
    key_1HND, value_1HND = _for_each_head(query_1HND, key_1HND, value_1HND)
    lengths = list(packing.lengths)
    attended = []
    for query, key, value in zip(
        torch.split(query_1HND, lengths, dim=2),
        torch.split(key_1HND, lengths, dim=2),
        torch.split(value_1HND, lengths, dim=2),
        strict=True,
    ):
        window = None
        if sliding_window is not None and query.shape[2] > sliding_window:
            ones = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device)
            window = ones.tril().triu(1 - sliding_window)
        attended.append(
            scaled_dot_product_attention(
                query, key, value, attn_mask=window, is_causal=window is None, scale=scaling
            )
        )
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous()


def takes_varlen(
    *, capability: tuple[int, int] | None, dtype: torch.dtype, width: int, value_width: int
) -> bool:
    """Whether torch's kernel for many lengths exists for such tensors on such a device.

    Args:
        capability: the compute capability of an NVIDIA GPU; None for any other device.
        width: of a head of queries and keys; `value_width` of one of values.
    """
    return (
        capability is not None
        and capability >= _OLDEST_GPU
        and dtype in (torch.bfloat16, torch.float16)
        and width == value_width
        and width % _WIDTH_STEP == 0
        and width <= _WIDEST
    )


@functools.cache
def varlen_kernel() -> VarlenKernel:
    """That of the torch in use."""
    return VarlenKernel.of(varlen_attn)


@functools.cache
def capability_of(device: torch.device) -> tuple[int, int] | None:
    """An NVIDIA GPU's compute capability; None for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def _for_each_head(
    query_1HND: Tensor, key_1HND: Tensor, value_1HND: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values, repeated where several heads of queries share them."""
    heads_per_key = query_1HND.shape[1] // key_1HND.shape[1]
    if heads_per_key > 1:
        key_1HND = key_1HND.repeat_interleave(heads_per_key, dim=1)
        value_1HND = value_1HND.repeat_interleave(heads_per_key, dim=1)
    return key_1HND, value_1HND


_recorded: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # whose attention was computed here


@contextlib.contextmanager
def recorded() -> Iterator[weakref.WeakSet[nn.Module]]:
    """The modules whose attention is computed here in the block."""
    _recorded.clear()
    yield _recorded


def _packed_attention(
    module: nn.Module,
    query_1HND: Tensor,
    key_1HND: Tensor,
    value_1HND: Tensor,
    attention_mask: Tensor | None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer."""
    _recorded.add(module)
    for name in _UNKNOWN_TO_US:
        if settings.get(name) is not None:
            raise ValueError(f"{type(module).__name__} needs {name!r} in attention: not supported")
    if attention_mask is not None:
        raise ValueError(f"{type(module).__name__} has a mask of its own: not supported")
    if packing is None:
        raise ValueError(f"{type(module).__name__} is not told where packed sequences end")
    if (group := packing.group) is not None:
        query_1HND, key_1HND, value_1HND = group.by_heads(query_1HND, key_1HND, value_1HND)
    attend = attend_one_by_one
    if takes_varlen(
        capability=capability_of(query_1HND.device),
        dtype=query_1HND.dtype,
        width=query_1HND.shape[3],
        value_width=value_1HND.shape[3],
    ):
        attend = varlen_kernel().attend
    attended_1NHD = attend(
        query_1HND, key_1HND, value_1HND, packing, scaling=scaling, sliding_window=sliding_window
    )
    return attended_1NHD if group is None else group.by_tokens(attended_1NHD), None


# No mask function is registered under this name, so transformers makes no mask either. Compiled
# layers call it as it is: it goes by the sequences' lengths, which are others in each pass.
AttentionInterface.register(PACKED_ATTENTION, torch.compiler.disable(_packed_attention))  # type: ignore[no-untyped-call]
