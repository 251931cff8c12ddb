"""How the losses of tokens become one loss (docs/objectives.md); imports no torch.

Each trained token counts its mask times the scale of its sample. Sums and the number of samples are
those of the whole mini-batch, on all ranks, and known before it is divided: so no division changes
the loss.
"""

from collections.abc import Sequence

from flash.trainer.objectives.settings import Aggregation
from flash.types import Sample


def scales(
    samples: Sequence[Sample], aggregation: Aggregation, fixed_length: int | None = None
) -> list[float]:
    """The scale of each sample of one mini-batch. Each must have a token to train on."""
    total = denominator(samples, aggregation)
    return [scale / total for scale in scales_of_part(samples, aggregation, fixed_length)]


def scales_of_part(
    samples: Sequence[Sample], aggregation: Aggregation, fixed_length: int | None = None
) -> list[float]:
    """As `scales`, but still to be divided by the sum of `denominator` over all parts."""
    match aggregation:
        case "token_mean" | "sequence_sum":
            return [1.0] * len(samples)
        case "sequence_mean":
            return [1 / _mass(sample) for sample in samples]
        case "fixed_length":
            assert fixed_length is not None
            return [1 / fixed_length] * len(samples)


def denominator(samples: Sequence[Sample], aggregation: Aggregation) -> float:
    """What a mini-batch's loss is divided by; that of parts adds up."""
    if aggregation == "token_mean":
        return sum(_mass(sample) for sample in samples)
    return float(len(samples))


def _mass(sample: Sample) -> float:
    # The first token has no logprob, so its mask counts for nothing.
    return float(sample.loss_mask[1:].sum(dtype=float))
