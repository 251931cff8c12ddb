# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Attention of a step's new tokens to keys and values that lie in pages of a cache, on a GPU.

    store ─► one new token each: attend to parts of the sequences ─► join the parts
          └► otherwise: attend, in blocks of tokens of one sequence

torch's kernel takes pages of 256 tokens and multiples of it; ours are small, so that short prefixes
can be shared. All that a step says in numbers is read by the device, so that one CUDA graph serves
any step of as many tokens.

Legend: N new tokens of Q requests, one after the other; H heads of queries, G heads of keys; D
width of a head; P tokens of a page.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS = 64  # that a program looks at together
_ROWS = 64  # tokens times heads of a block, where requests have several new tokens
_PROGRAMS = 256  # parts are made until there is work for about so many
_MOST_PARTS = 32
_LOG2_E = 1.4426950408889634


def attend_in_pages(
    query_NHD: Tensor,
    key_NGD: Tensor,
    value_NGD: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    pages: Tensor,
    queries: Tensor,
    ends: Tensor,
    unused: int,
    scale: float,
) -> Tensor:
    """Stores the new keys and values; each new token attends to what its request has up to it.

    Args:
        keys: the cache, [pages, P, G, D], contiguous; `values` likewise.
        pages: int32, [Q, most pages of a request]: where each one's tokens are.
        queries: int32, [Q + 1]: where each one's new tokens begin, and the end of the last.
        ends: int32, [Q + 1]: its differences are how many tokens each one has, with the new ones;
            0 for a row that only fills up, as tokens behind the last of `queries` do.
        unused: the token of the cache that such ones may write.
    """
    tokens, heads, width = query_NHD.shape
    requests, groups, page = len(queries) - 1, key_NGD.shape[1], keys.shape[1]
    shape = {
        "groups": groups,
        "width": width,
        "padded": triton.next_power_of_2(width),
        "page": page,
    }
    group = heads // groups
    scale *= _LOG2_E
    _store[(tokens, groups)](
        key_NGD, value_NGD, keys, values, pages, queries, ends, unused, requests,
        *key_NGD.stride()[:2], *value_NGD.stride()[:2], pages.stride(0),
        steps=requests.bit_length(), **shape,
    )  # fmt: skip
    out = torch.zeros(tokens, heads, width, dtype=query_NHD.dtype, device=query_NHD.device)
    if tokens > requests:
        together = triton.next_power_of_2(group)
        of_block = max(1, _ROWS // together)
        _attend_block[(tokens // of_block + requests, groups)](
            query_NHD, keys, values, pages, queries, ends, out, requests,
            *query_NHD.stride()[:2], pages.stride(0), scale, group=group, together=together,
            of_block=of_block, steps=requests.bit_length(), block=_KEYS, **shape,
        )  # fmt: skip
        return out
    parts = _parts(requests * groups)
    attended = out.new_empty(requests, heads, parts, width, dtype=torch.float32)
    totals = out.new_empty(requests, heads, parts, dtype=torch.float32)
    _attend_part[(requests, groups, parts)](
        query_NHD, keys, values, pages, ends, attended, totals,
        *query_NHD.stride()[:2], pages.stride(0), scale,
        group=group, rows=max(16, triton.next_power_of_2(group)), parts=parts, block=_KEYS,
        **shape,
    )  # fmt: skip
    _join[(requests, heads)](
        attended, totals, out, heads=heads, parts=parts, width=width, padded=shape["padded"]
    )
    return out


def _parts(rows: int) -> int:
    parts = 1
    while parts < _MOST_PARTS and parts * rows < _PROGRAMS:
        parts *= 2
    return parts


@triton.jit
def _store(
    key, value, keys, values, pages, queries, ends, unused, requests,
    key_token, key_group, value_token, value_group, pages_request, steps: tl.constexpr,
    groups: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, page: tl.constexpr,
) -> None:  # fmt: skip
    token, of = tl.program_id(0), tl.program_id(1)
    request = 0
    above = requests
    for _step in range(steps):  # the last one that begins at the token or before
        middle = (request + above) // 2
        before = tl.load(queries + middle) <= token
        request = tl.where(before, middle, request)
        above = tl.where(before, above, middle)
    length = tl.load(ends + request + 1) - tl.load(ends + request)
    behind = tl.load(queries + request + 1) - token
    used = (behind > 0) & (length > 0)
    position = length - behind
    column = tl.arange(0, padded)
    inside = column < width
    number = tl.load(pages + request * pages_request + position // page, mask=used, other=0)
    place = tl.where(used, number.to(tl.int64) * page + position % page, unused)
    place = (place * groups + of) * width + column
    new = tl.load(key + token * key_token + of * key_group + column, mask=inside)
    tl.store(keys + place, new, mask=inside)
    new = tl.load(value + token * value_token + of * value_group + column, mask=inside)
    tl.store(values + place, new, mask=inside)


@triton.jit
def _softmax_over(
    asked, keys, values, pages, begin, end, last, of, scale, rows: tl.constexpr,
    groups: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, page: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Of the tokens from `begin` to `end`, for rows that look on up to `last`."""
    column = tl.arange(0, padded)
    largest = tl.full([rows], -1e30, tl.float32)
    total = tl.zeros([rows], tl.float32)
    found = tl.zeros([rows, padded], tl.float32)
    for start in range(begin, end, block):
        position = start + tl.arange(0, block)
        there = position < end
        number = tl.load(pages + position // page, mask=there, other=0)
        token = number.to(tl.int64) * page + position % page
        place = (token * groups + of)[:, None] * width + column[None, :]
        known = there[:, None] & (column < width)[None, :]
        key = tl.load(keys + place, mask=known, other=0.0)
        score = tl.dot(asked, tl.trans(key)) * scale
        seen = there[None, :] & (position[None, :] <= last[:, None])
        score = tl.where(seen, score, -1e30)
        highest = tl.maximum(largest, tl.max(score, 1))
        weight = tl.where(seen, tl.exp2(score - highest[:, None]), 0.0)
        kept = tl.exp2(largest - highest)
        total = total * kept + tl.sum(weight, 1)
        value = tl.load(values + place, mask=known, other=0.0)
        found = found * kept[:, None] + tl.dot(weight.to(value.dtype), value)
        largest = highest
    return found, total, largest


@triton.jit
def _attend_part(
    query, keys, values, pages, ends, attended, totals,
    query_token, query_head, pages_request, scale,
    group: tl.constexpr, rows: tl.constexpr, parts: tl.constexpr, block: tl.constexpr,
    groups: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, page: tl.constexpr,
) -> None:  # fmt: skip
    """One part of a request's tokens, for the heads that share a head of keys."""
    request, of, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(ends + request + 1) - tl.load(ends + request)
    each = tl.cdiv(tl.cdiv(length, parts), block) * block
    begin = part * each
    end = tl.minimum(begin + each, length)
    row, column = tl.arange(0, rows), tl.arange(0, padded)
    head = of * group + row
    inside = (row < group)[:, None] & (column < width)[None, :]
    asked = tl.load(
        query + request * query_token + head[:, None] * query_head + column[None, :],
        mask=inside, other=0.0,
    )  # fmt: skip
    last = tl.zeros([rows], tl.int32) + length
    found, total, largest = _softmax_over(
        asked, keys, values, pages + request * pages_request, begin, end, last, of, scale, rows,
        groups, width, padded, page, block,
    )  # fmt: skip
    total = tl.where(begin < end, total, 1.0)
    place = (request * groups * group + head) * parts + part
    tl.store(
        attended + place[:, None] * width + column[None, :], found / total[:, None], mask=inside
    )
    weight = tl.where(begin < end, largest + tl.log2(total), -1e30)
    tl.store(totals + place, weight, mask=row < group)


@triton.jit
def _join(
    attended, totals, out,
    heads: tl.constexpr, parts: tl.constexpr, width: tl.constexpr, padded: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * heads + tl.program_id(1)
    part, column = tl.arange(0, parts), tl.arange(0, padded)
    inside = column < width
    weight = tl.load(totals + row * parts + part)
    weight = tl.exp2(weight - tl.max(weight, 0))
    found = tl.load(
        attended + (row * parts + part)[:, None] * width + column[None, :],
        mask=inside[None, :], other=0.0,
    )  # fmt: skip
    joined = tl.sum(found * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * width + column, joined.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _attend_block(
    query, keys, values, pages, queries, ends, out, requests,
    query_token, query_head, pages_request, scale,
    group: tl.constexpr, together: tl.constexpr, of_block: tl.constexpr, steps: tl.constexpr,
    block: tl.constexpr,
    groups: tl.constexpr, width: tl.constexpr, padded: tl.constexpr, page: tl.constexpr,
) -> None:  # fmt: skip
    """Some new tokens of one request, which has as many blocks as it needs and one more at most."""
    number, of = tl.program_id(0), tl.program_id(1)
    request = 0
    above = requests
    for _step in range(steps):  # the last one whose blocks begin at this or before
        middle = (request + above) // 2
        before = tl.load(queries + middle) // of_block + middle <= number
        request = tl.where(before, middle, request)
        above = tl.where(before, above, middle)
    first = tl.load(queries + request)
    new = tl.load(queries + request + 1) - first
    length = tl.load(ends + request + 1) - tl.load(ends + request)
    begun = (number - first // of_block - request) * of_block
    if begun < new:
        rows: tl.constexpr = of_block * together
        row, column = tl.arange(0, rows), tl.arange(0, padded)
        token = begun + row // together
        head = of * group + row % together
        used = (token < new) & (row % together < group)
        inside = used[:, None] & (column < width)[None, :]
        asked = tl.load(
            query + (first + token)[:, None] * query_token + head[:, None] * query_head
            + column[None, :],
            mask=inside, other=0.0,
        )  # fmt: skip
        last = length - new + token
        end = tl.minimum(length - new + begun + of_block, length)
        found, total, _largest = _softmax_over(
            asked, keys, values, pages + request * pages_request, 0, end, last, of, scale, rows,
            groups, width, padded, page, block,
        )  # fmt: skip
        place = (first + token) * groups * group + head
        tl.store(
            out + place[:, None] * width + column[None, :],
            (found / total[:, None]).to(out.dtype.element_ty),
            mask=inside,
        )
