"""Divides a batch over optimizer steps, ranks, forward passes and rows, by tokens.

    batch ─► mini-batches (one optimizer step each) ─► ranks ─► micro-batches (one pass each)
          ─► rows (a few sequences one after the other; attention stays within a row)

Attention over a row costs its length squared, whatever the mask says, so rows are short: twice the
longest sample, which leaves little room unused and keeps attention cheap.
"""

from collections.abc import Sequence

Row = list[int]  # sample indices
MicroBatch = list[Row]


def plan(
    lengths: Sequence[int], *, mini_batches: int, ranks: int, tokens_per_micro_batch: int
) -> list[list[list[MicroBatch]]]:
    """`plan[mini_batch][rank]` is a list of micro-batches of rows of sample indices.

    Every sample is in exactly one row. All ranks have equally many micro-batches in a mini-batch,
    because every pass is a collective; some may be empty lists. A row is longer than
    `tokens_per_micro_batch` only if it is one sample that is.
    """
    row_tokens = min(2 * max(lengths), tokens_per_micro_batch)
    rows_per_pass = max(1, tokens_per_micro_batch // row_tokens)
    # Every mini-batch takes some of each group, because neighbours go to different ones.
    return [
        _over_ranks(
            range(start, len(lengths), mini_batches), lengths, ranks, row_tokens, rows_per_pass
        )
        for start in range(mini_batches)
    ]


def _over_ranks(
    indices: Sequence[int], lengths: Sequence[int], ranks: int, row_tokens: int, rows_per_pass: int
) -> list[list[MicroBatch]]:
    """The longest sample first, each to the rank with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(indices, key=lambda i: -lengths[i]):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    rows_of = [_pack(share, lengths, row_tokens) for share in shares]
    passes = max(-(-len(rows) // rows_per_pass) for rows in rows_of)
    # Rows are dealt out evenly, so that no pass is much smaller than the others.
    return [[rows[number::passes] for number in range(passes)] for rows in rows_of]


def _pack(indices: Sequence[int], lengths: Sequence[int], row_tokens: int) -> list[Row]:
    """First fit, longest first."""
    rows: list[Row] = []
    room: list[int] = []
    for index in indices:
        length = lengths[index]
        for number, left in enumerate(room):
            if length <= left:
                rows[number].append(index)
                room[number] -= length
                break
        else:
            rows.append([index])
            room.append(row_tokens - length)
    return rows
