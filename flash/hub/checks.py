"""What no worker can truthfully answer; one that does is broken."""

import math
from collections.abc import Set

from flash.hub.slot import Slot
from flash.hub.worker import WorkerBroken
from flash.types import Completion, SamplingParams

_EXPERTS_AXES = 2


def check_completion(answer: Completion, sampling: SamplingParams, published: Set[int]) -> None:
    """A worker that answers what can't be true has failed."""
    tokens = len(answer.token_ids)
    if not tokens == len(answer.logprobs) == len(answer.versions) or tokens > sampling.max_tokens:
        raise WorkerBroken(
            f"{answer.worker} answered {len(answer.token_ids)} tokens, {len(answer.logprobs)} "
            f"logprobs, {len(answer.versions)} versions to max_tokens={sampling.max_tokens}"
        )
    if not math.isfinite(sum(answer.logprobs)) and not all(map(math.isfinite, answer.logprobs)):
        raise WorkerBroken(f"{answer.worker} answered a logprob that is not finite")
    told = answer.experts is not None or answer.finish_reason == "abort"
    if sampling.experts_from is not None and not told:
        raise WorkerBroken(
            f"{answer.worker} does not tell which experts tokens were routed to: start it as "
            f"docs/engines.md says, or leave trainer.router_replay out"
        )
    if answer.experts is not None and answer.experts.ndim != _EXPERTS_AXES:
        raise WorkerBroken(
            f"{answer.worker} answered experts of the shape {list(answer.experts.shape)}, which is "
            f"none of tokens and their experts"
        )
    only = answer.only_version
    versions = set(answer.versions) if only is None else {only}
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
