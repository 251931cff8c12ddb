"""Divides a batch over optimizer steps, ranks and forward passes, by tokens.

    batch ─► mini-batches (one optimizer step each) ─► ranks ─► micro-batches (one pass each)

The samples of a micro-batch lie one after the other, without padding (see scorer.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from flash.trainer.config import TrainerConfig
from flash.trainer.objectives.aggregation import denominator, scales, scales_of_part
from flash.types import Sample

Indices = list[int]  # of the samples of one micro-batch


@dataclass(frozen=True, slots=True)
class MiniBatchShare:
    """A rank's share of a mini-batch, which is what one optimizer step trains on.

    `scales[micro][sample]` is what a trained token's loss is multiplied by, besides its mask,
    before all are added up: over the micro-batches and ranks the sum is the mini-batch's loss.
    Of what an expert wrote, `weight` is its μ; the policy's own samples have the rest.
    """

    micro_batches: list[list[Sample]]
    scales: list[list[float]]
    weight: float = 1.0


NOTHING = MiniBatchShare([], [], 0.0)


def divide(
    samples: Sequence[Sample],
    config: TrainerConfig,
    *,
    part: bool = False,
    mini_batches: int | None = None,
    weight: float = 1.0,
) -> list[list[MiniBatchShare]]:
    """`divide[rank]` is what that rank trains on, a share of each optimizer step.

    The scales of a `part` are still to be divided by the `denominator` of all parts.
    """
    scales_of = scales_of_part if part else scales
    planned = plan(
        [sample.num_tokens for sample in samples],
        mini_batches=mini_batches or config.mini_batches,
        ranks=config.ranks,
        sequence_ranks=config.sequence_ranks,
        tokens_per_micro_batch=config.tokens_of_pass,
    )
    aggregation = config.aggregation or config.objective.aggregation
    shares: list[list[MiniBatchShare]] = [[] for _ in range(config.ranks)]
    for of_ranks in planned:
        each_once = of_ranks[:: config.sequence_ranks]
        members = [i for micros in each_once for micro in micros for i in micro]
        of_members = scales_of([samples[i] for i in members], aggregation, config.fixed_length)
        scale = dict(zip(members, of_members, strict=True))
        for share, micros in zip(shares, of_ranks, strict=True):
            share.append(
                MiniBatchShare(
                    [[samples[i] for i in micro] for micro in micros],
                    [[scale[i] for i in micro] for micro in micros],
                    weight,
                )
            )
    return shares


def divide_expert(
    samples: Sequence[Sample], weight: float, config: TrainerConfig, *, mini_batches: int
) -> list[list[MiniBatchShare]]:
    """As `divide`, of what an expert wrote, for as many optimizer steps as the policy's own
    samples make. With fewer samples than that the last of them have none, and weight 0."""
    shares = divide(samples, config, mini_batches=mini_batches, weight=weight)
    return [share + [NOTHING] * (mini_batches - len(share)) for share in shares]


def denominator_of(samples: Sequence[Sample], config: TrainerConfig) -> float:
    """A part's share of what the batch's loss is divided by."""
    return denominator(samples, config.aggregation or config.objective.aggregation)


def plan(
    lengths: Sequence[int],
    *,
    mini_batches: int,
    ranks: int,
    tokens_per_micro_batch: int,
    sequence_ranks: int = 1,
) -> list[list[list[Indices]]]:
    """`plan[mini_batch][rank]` is a list of micro-batches, as indices of samples.

    Every sample is in exactly one micro-batch, which `sequence_ranks` that follow each other have
    in common. All ranks have equally many of them in a mini-batch, because every pass is a
    collective; some may be empty. A micro-batch is longer than `tokens_per_micro_batch` only if it
    is one sample that is. No mini-batch is empty: with fewer samples than `mini_batches` there are
    fewer of them.
    """
    # Every mini-batch takes some of each group, because neighbours go to different ones.
    strides = min(mini_batches, len(lengths))
    groups = ranks // sequence_ranks
    of_groups = [
        _over_ranks(range(start, len(lengths), strides), lengths, groups, tokens_per_micro_batch)
        for start in range(strides)
    ]
    return [[micros for micros in mini for _ in range(sequence_ranks)] for mini in of_groups]


def in_passes(
    sequences: Sequence[Sequence[int]], tokens_per_pass: int
) -> list[list[Sequence[int]]]:
    """The sequences in their order, in as few passes as that allows; one that is longer than a
    pass has one of its own."""
    passes: list[list[Sequence[int]]] = []
    room = 0
    for sequence in sequences:
        if not passes or len(sequence) > room:
            passes.append([])
            room = tokens_per_pass
        passes[-1].append(sequence)
        room -= len(sequence)
    return passes


def _over_ranks(
    indices: Sequence[int], lengths: Sequence[int], ranks: int, tokens_per_micro_batch: int
) -> list[list[Indices]]:
    """The longest sample first, each to the rank with the fewest tokens."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(indices, key=lambda i: -lengths[i]):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += lengths[index]
    packed = [_pack(share, lengths, tokens_per_micro_batch) for share in shares]
    passes = max(len(micro_batches) for micro_batches in packed)
    return [micro_batches + [[]] * (passes - len(micro_batches)) for micro_batches in packed]


def _pack(
    indices: Sequence[int], lengths: Sequence[int], tokens_per_micro_batch: int
) -> list[Indices]:
    """First fit, longest first."""
    micro_batches: list[Indices] = []
    room: list[int] = []
    for index in indices:
        length = lengths[index]
        for number, left in enumerate(room):
            if length <= left:
                micro_batches[number].append(index)
                room[number] -= length
                break
        else:
            micro_batches.append([index])
            room.append(tokens_per_micro_batch - length)
    return micro_batches
