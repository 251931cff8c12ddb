"""A response on its way: what workers have sampled of it, part by part."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from flash.types import (
    UNKNOWN_EXPERT,
    Completion,
    Experts,
    FinishReason,
    GenerateRequest,
    SamplingParams,
)


@dataclass(slots=True, eq=False)
class PartialCompletion:
    """What a worker that streams has told of a completion, as far as its version is certain."""

    version: int
    temperature: float
    sampled: int = 0  # of the response, whatever their version and with those before
    on_sampled: Callable[[int], None] | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def count(self, tokens: int) -> None:
        """So many more were sampled."""
        self.sampled += tokens
        if self.on_sampled is not None:
            self.on_sampled(self.sampled)

    def as_aborted(self, worker: str) -> Completion:
        """What is worth keeping of it when its worker has failed."""
        known = all(map(math.isfinite, self.logprobs))
        return Completion(
            token_ids=self.token_ids if known else [],
            logprobs=self.logprobs if known else [],
            versions=[self.version] * len(self.token_ids) if known else [],
            temperature=self.temperature,
            finish_reason="abort",
            worker=worker,
        )


class Response:
    """What one request has been answered so far, by however many workers.

    Args:
        on_new: called with how many tokens it has more than ever before.
        on_sampled: called with how many it has: fewer than before if a worker failed.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        on_new: Callable[[int], None],
        on_sampled: Callable[[int], None] | None,
    ) -> None:
        self._request = request
        self._on_new = on_new
        self._on_sampled = on_sampled
        self._most = 0
        self._token_ids: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._experts: list[Experts] = []

    def rest(self) -> tuple[Sequence[int], SamplingParams]:
        """What to ask for next: the prompt with all that there is, and how to go on from it."""
        sampling = self._request.sampling
        if sampling.experts_from is not None:
            known = sum(map(len, self._experts))
            sampling = replace(sampling, experts_from=sampling.experts_from + known)
        if not self._token_ids:
            return self._request.token_ids, sampling
        sampling = replace(sampling, max_tokens=sampling.max_tokens - len(self._token_ids))
        return [*self._request.token_ids, *self._token_ids], sampling

    def begin(self, version: int) -> PartialCompletion:
        """A worker with that version goes on with it."""
        temperature = self._request.sampling.temperature
        return PartialCompletion(version, temperature, len(self._token_ids), self._count)

    def add(self, part: Completion, *, worker: str) -> Completion | None:
        """Joins what a worker sampled to the rest; the whole completion once that was all."""
        temperature = self._request.sampling.temperature
        told = self._token_ids or self._experts
        if not told and part.finish_reason != "abort":  # as nearly always
            self._count(len(part.token_ids))
            if part.worker == worker and part.temperature == temperature:
                return part
            return replace(part, worker=worker, temperature=temperature)
        if self._request.sampling.constraint is not None:
            # A constraint begins with the response, so no other worker can go on within it.
            self._count(0)
            return None
        self._token_ids += part.token_ids
        self._logprobs += part.logprobs
        self._versions += part.versions
        if part.experts is not None:
            self._experts.append(part.experts)
        self._count(len(self._token_ids))
        reason: FinishReason = part.finish_reason
        if reason == "abort":
            if len(self._token_ids) < self._request.sampling.max_tokens:
                return None
            reason = "length"  # only the end of the answer was lost
        return Completion(
            token_ids=self._token_ids,
            logprobs=self._logprobs,
            versions=self._versions,
            temperature=temperature,
            finish_reason=reason,
            worker=worker,
            experts=self._joined_experts(),
        )

    def _joined_experts(self) -> Experts | None:
        """Of all tokens but the last; None if nobody told any."""
        start = self._request.sampling.experts_from
        if start is None or not self._experts:
            return None
        experts = np.concatenate(self._experts)
        tokens = len(self._request.token_ids) + len(self._token_ids) - 1 - start
        lacking = tokens - len(experts)  # where only the end of the answer was lost
        return np.pad(experts, ((0, lacking), (0, 0)), constant_values=UNKNOWN_EXPERT)

    def _count(self, sampled: int) -> None:
        self._on_new(max(0, sampled - self._most))
        self._most = max(self._most, sampled)
        if self._on_sampled is not None:
            self._on_sampled(sampled)
