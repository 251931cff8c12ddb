"""What no worker can truthfully answer; one that does is broken."""

import math
from collections.abc import Sequence, Set

from flash.hub.slot import Slot
from flash.hub.worker import WorkerBroken
from flash.types import Completion, SamplingParams


def check_completion(
    answer: Completion, prompt: Sequence[int], sampling: SamplingParams, published: Set[int]
) -> None:
    """A worker that answers what can't be true has failed."""
    tokens = len(answer.token_ids)
    if not tokens == len(answer.logprobs) == len(answer.versions) or tokens > sampling.max_tokens:
        raise WorkerBroken(
            f"{answer.worker} answered {len(answer.token_ids)} tokens, {len(answer.logprobs)} "
            f"logprobs, {len(answer.versions)} versions to max_tokens={sampling.max_tokens}"
        )
    if not math.isfinite(sum(answer.logprobs)) and not all(map(math.isfinite, answer.logprobs)):
        raise WorkerBroken(f"{answer.worker} answered a logprob that is not finite")
    if sampling.experts_from is not None:
        _check_experts(answer, max(0, len(prompt) + tokens - 1 - sampling.experts_from))
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


def _check_experts(answer: Completion, tokens: int) -> None:
    """Of so many tokens, or of the first of them where an answer was broken off: of others, they
    would be taken for another token's."""
    aborted = answer.finish_reason == "abort"
    if answer.experts is None:
        if aborted:
            return
        raise WorkerBroken(
            f"{answer.worker} does not tell which experts tokens were routed to: start it as "
            f"docs/engines.md says, or leave trainer.router_replay out"
        )
    told, *of_each = answer.experts.shape
    if len(of_each) != 1 or told > tokens or (told < tokens and not aborted):
        raise WorkerBroken(
            f"{answer.worker} answered experts of the shape {[told, *of_each]}, where {tokens} "
            f"tokens have some"
        )


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
