"""What no worker can truthfully answer; one that does is broken."""

import math
from collections.abc import Sequence, Set

from flash.errors import PublishFailure
from flash.hub.slot import Slot
from flash.hub.worker import WorkerBroken
from flash.types import Completion, SamplingParams


def check_completion(answer: Completion, sampling: SamplingParams, published: Set[int]) -> None:
    """A worker that answers what can't be true has failed."""
    tokens = len(answer.token_ids)
    if not tokens == len(answer.logprobs) == len(answer.versions) or tokens > sampling.max_tokens:
        raise WorkerBroken(
            f"{answer.worker} answered {len(answer.token_ids)} tokens, {len(answer.logprobs)} "
            f"logprobs, {len(answer.versions)} versions to max_tokens={sampling.max_tokens}"
        )
    if not all(map(math.isfinite, answer.logprobs)):
        raise WorkerBroken(f"{answer.worker} answered a logprob that is not finite")
    versions = set(answer.versions)
    if unknown := versions - published:
        raise WorkerBroken(
            f"{answer.worker} answered with policy versions {sorted(unknown)}, which were "
            f"never published to it"
        )
    if not answer.token_ids and answer.finish_reason != "abort":
        raise WorkerBroken(f"{answer.worker} answered no tokens at all")
    if len(versions) > 1 and answer.versions != sorted(answer.versions):
        raise WorkerBroken(f"{answer.worker} answered with policy versions that go back")


def check_age(answer: Completion, slot: Slot, *, since: int) -> None:
    """Nor can an answer be older than the version that the worker had when it was asked."""
    if answer.versions and answer.versions[0] < since:
        raise WorkerBroken(
            f"{answer.worker} answered with policy version {answer.versions[0]}, but had been "
            f"given {since} before: was it started anew?"
        )
    # It would be asked for the same again, at once and for ever.
    if not answer.token_ids and slot.accepting and slot.version == since:
        raise WorkerBroken(f"{answer.worker} aborted a request that nobody asked it to abort")


def check_gap(
    answer: Completion, expected: Sequence[float], *, after: int, version: int, limit: float
) -> float:
    """The largest difference to the trainer's logprobs; PublishFailure if that is above `limit`.

    `after` so many tokens of a prompt.
    """
    differences = [abs(a - b) for a, b in zip(answer.logprobs, expected, strict=True)]
    # max() alone would pass over a nan.
    gap = max(differences) if all(map(math.isfinite, differences)) else math.nan
    if set(answer.versions) != {version} or not gap <= limit:
        raise PublishFailure(
            f"{answer.worker} should sample with version {version}: it says "
            f"{sorted(set(answer.versions))}, and its logprobs differ from the trainer's by "
            f"{gap:.2g} after a prompt of {after} tokens, more than engine.gap_limit={limit:g}. "
            f"Either it has other weights, or its attention has other windows or positions, or the "
            f"two compute in precisions that need a higher limit"
        )
    return gap
