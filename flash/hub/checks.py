"""What no worker can truthfully answer; one that does is broken."""

import math
from collections.abc import Sequence, Set

from flash.errors import PublishFailure
from flash.hub.slot import Slot
from flash.hub.worker import WorkerBroken
from flash.types import Completion, SamplingParams


def check(piece: Completion, sampling: SamplingParams, published: Set[int]) -> None:
    """A worker that answers what can't be true has failed."""
    lengths = {len(piece.token_ids), len(piece.logprobs), len(piece.versions)}
    if len(lengths) != 1 or len(piece.token_ids) > sampling.max_tokens:
        raise WorkerBroken(
            f"{piece.worker} answered {len(piece.token_ids)} tokens, {len(piece.logprobs)} "
            f"logprobs, {len(piece.versions)} versions to max_tokens={sampling.max_tokens}"
        )
    if not all(math.isfinite(logprob) for logprob in piece.logprobs):
        raise WorkerBroken(f"{piece.worker} answered a logprob that is not finite")
    if unknown := set(piece.versions) - published:
        raise WorkerBroken(
            f"{piece.worker} answered with policy versions {sorted(unknown)}, which were "
            f"never published to it"
        )
    if not piece.token_ids and piece.finish_reason != "abort":
        raise WorkerBroken(f"{piece.worker} answered no tokens at all")
    if piece.versions != sorted(piece.versions):
        raise WorkerBroken(f"{piece.worker} answered with policy versions that go back")


def check_age(piece: Completion, slot: Slot, *, since: int) -> None:
    """Nor can an answer be older than the version that the worker had when it was asked."""
    if piece.versions and piece.versions[0] < since:
        raise WorkerBroken(
            f"{piece.worker} answered with policy version {piece.versions[0]}, but had been "
            f"given {since} before: was it started anew?"
        )
    # It would be asked for the same again, at once and for ever.
    if not piece.token_ids and slot.accepting and slot.version == since:
        raise WorkerBroken(f"{piece.worker} aborted a request that nobody asked it to abort")


def check_gap(piece: Completion, expected: Sequence[float], *, version: int, limit: float) -> float:
    """The largest difference to the trainer's logprobs; PublishFailure if that is above `limit`."""
    differences = [abs(a - b) for a, b in zip(piece.logprobs, expected, strict=True)]
    # max() alone would pass over a nan.
    gap = max(differences) if all(map(math.isfinite, differences)) else math.nan
    if set(piece.versions) != {version} or not gap <= limit:
        raise PublishFailure(
            f"{piece.worker} should sample with version {version}: it says "
            f"{sorted(set(piece.versions))}, and its logprobs differ from the trainer's by "
            f"{gap:.2g}, more than engine.gap_limit={limit:g}. Either it has "
            f"other weights, or the two compute in precisions that need a higher limit"
        )
    return gap
