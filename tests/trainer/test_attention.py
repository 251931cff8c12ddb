from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flash.trainer.attention import (
    Packing,
    VarlenKernel,
    attend_one_by_one,
    takes_varlen,
    varlen_kernel,
)
from flash.trainer.scorer import packed_inputs
from tests.varlen import varlen

LENGTHS = (7, 1, 30, 2, 12)
WIDTH = 8


def of_torch_2_11(
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
) -> Tensor:
    return varlen(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size,
        enable_gqa=True,
    )  # fmt: skip


def heads(
    queries: int, keys: int, lengths: tuple[int, ...] = LENGTHS, width: int = WIDTH, **where: Any
) -> list[Tensor]:
    """Random queries, keys and values of packed sequences, each [1, H, N, D]."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, count, sum(lengths), width, generator=generator).to(**where).requires_grad_()
        for count in (queries, keys, keys)
    ]


def attended_and_gradients(
    attend: Callable[..., Tensor],
    inputs: list[Tensor],
    lengths: tuple[int, ...],
    window: int | None,
) -> list[Tensor]:
    out = attend(*inputs, Packing.of(lengths, inputs[0].device), scaling=0.3, sliding_window=window)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weights.view_as(out)).sum(), inputs)]


def test_a_packing_says_where_each_sequence_begins_and_the_last_one_ends() -> None:
    packing = Packing.of([7, 1, 30], "cpu")
    assert packing.offsets.tolist() == [0, 7, 8, 38]
    assert packing.offsets.dtype == torch.int32
    assert (packing.lengths, packing.longest) == ((7, 1, 30), 30)


def test_positions_begin_anew_with_each_sequence() -> None:
    inputs = packed_inputs(torch.arange(6), (3, 1, 2))
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("queries, keys", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("call", [varlen, of_torch_2_11])
def test_one_call_for_all_sequences_is_as_one_call_each(
    call: Callable[..., Tensor], queries: int, keys: int, window: int | None
) -> None:
    kernel = VarlenKernel.of(call)
    inputs = heads(queries, keys, dtype=torch.float64)
    found = attended_and_gradients(kernel.attend, inputs, LENGTHS, window)
    expected = attended_and_gradients(attend_one_by_one, inputs, LENGTHS, window)
    assert found[0].shape == (1, sum(LENGTHS), queries, WIDTH)
    torch.testing.assert_close(found, expected)


GOOD: dict[str, Any] = {
    "capability": (9, 0),
    "dtype": torch.bfloat16,
    "width": 64,
    "value_width": 64,
}


@pytest.mark.parametrize(
    "change, taken",
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"width": 256, "value_width": 256}, True),
        ({"capability": (8, 0)}, True),
        ({"capability": None}, False),
        ({"capability": (7, 5)}, False),
        ({"dtype": torch.float32}, False),
        ({"width": 320, "value_width": 320}, False),
        ({"width": 20, "value_width": 20}, False),
        ({"width": 192, "value_width": 128}, False),
    ],
)
def test_one_call_for_all_is_for_gpus_half_precision_and_heads_it_has_kernels_for(
    change: dict[str, Any], taken: bool
) -> None:
    assert takes_varlen(**(GOOD | change)) is taken


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(5,), LENGTHS, (257, 3, 1000, 64)])
@pytest.mark.parametrize("window", [None, 5, 128])
@pytest.mark.parametrize("queries, keys, width", [(4, 4, 32), (14, 2, 64), (4, 1, 128)])
def test_on_a_gpu_one_call_for_all_sequences_is_as_one_call_each(
    queries: int, keys: int, width: int, window: int | None, lengths: tuple[int, ...]
) -> None:
    kernel = varlen_kernel()
    exact = heads(queries, keys, lengths, width, device="cuda", dtype=torch.float32)
    inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    found = attended_and_gradients(kernel.attend, inputs, lengths, window)
    one_by_one = attended_and_gradients(attend_one_by_one, inputs, lengths, window)
    expected = attended_and_gradients(attend_one_by_one, exact, lengths, window)
    names = ("out", "query", "key", "value")
    for name, one, other, true in zip(names, found, one_by_one, expected, strict=True):
        error, usual = ((of.float() - true).norm() / true.norm() for of in (one, other))
        # Of few tokens a gradient is a small difference of large numbers: what bfloat16 makes of
        # it in any kernel is no fault of this one's.
        assert error < max(0.02, 2 * usual), f"{name}: {error:.4f}, one by one {usual:.4f}"
