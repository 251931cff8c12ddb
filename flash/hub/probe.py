"""The probe: what a worker is asked after a publish, and how far from the trainer it may be.

    some prompts ─► tokens that the worker samples ─┬─► its logprobs         ─┐
                                                    └─► the trainer's of them ─┴─► Gap ─► its limit

A logprob moves by 1 - p for each nat that the token's logit does. So a difference of logprobs over
1 - p is one of logits, which rounding makes as large where the policy is sure as where it is not.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np

from flash.errors import PublishFailure
from flash.types import Completion, Scores

# Any token ids that every vocabulary has, no prompt like another.
_PROMPTS = tuple(itertools.islice(itertools.product((1, 2, 3), repeat=4), 5, None, 10))
# Logprobs are differences of float32 numbers of up to 100 or so; near 0 that is all they differ by.
_ROUNDED = 1e-5
_LEAST_LEFT = 1e-3  # of 1 - p
_WITHIN = 0.9  # the share of tokens whose logits may not be off by more than the limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What each worker samples, and its limit.

    `tokens` are sampled after each of `prompts`, all of them at the same time. Nine tenths of the
    logits may be off by `gap_limit` nats, or by `of_largest` of the largest logit if that is more.
    """

    prompts: Sequence[Sequence[int]] = _PROMPTS
    tokens: int = 16
    gap_limit: float = 1e-3
    of_largest: float = 0.0

    def limit(self, largest_logit: float) -> float:
        """In nats, where no logit is larger."""
        return max(self.gap_limit, self.of_largest * largest_logit)

    def fitting(self, longest: int) -> Self:
        """As this one, with no sequence of more tokens than `longest`."""
        prompts = [list(prompt)[: max(1, longest - 1)] for prompt in self.prompts]
        room = max(1, longest - max(map(len, prompts)))
        return replace(self, prompts=prompts, tokens=min(self.tokens, room))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """How far a worker's logprobs are from the trainer's, over tokens that the worker sampled.

    median, p90, max: of |difference of logprobs|, in nats.
    kl: KL(worker ‖ trainer) in nats a token, k3 estimate, never below 0.
    logits: 90% of the tokens' logits are off by no more: the quantile of |difference| / (1 - p).
    """

    tokens: int
    median: float
    p90: float
    max: float
    kl: float
    logits: float

    @classmethod
    def between(cls, worker: Sequence[float], trainer: Sequence[float]) -> Self:
        """Of the logprobs of the same tokens. Where one is not finite, so is no difference."""
        worker_T, trainer_T = np.asarray(worker, float), np.asarray(trainer, float)
        assert worker_T.shape == trainer_T.shape, "logprobs of other tokens"
        difference_T = trainer_T - worker_T
        if not np.isfinite(difference_T).all():
            nan = math.nan
            return cls(tokens=len(worker_T), median=nan, p90=nan, max=nan, kl=nan, logits=nan)
        size_T = np.abs(difference_T)
        with np.errstate(over="ignore"):  # a token that the worker gave no chance: infinite it is
            kl_T = np.maximum(0.0, np.expm1(difference_T) - difference_T)
        left_T = -np.expm1(np.minimum(0.0, worker_T)) + _LEAST_LEFT
        logits_T = np.maximum(0.0, size_T - _ROUNDED) / left_T
        return cls(
            tokens=len(worker_T),
            median=float(np.median(size_T)),
            p90=float(np.quantile(size_T, 0.9)),
            max=float(size_T.max()),
            kl=float(kl_T.mean()),
            logits=float(np.quantile(logits_T, _WITHIN)),
        )

    @classmethod
    def worst(cls, gaps: Sequence[Self]) -> Self | None:
        """The largest of each number; None of none."""
        if not gaps:
            return None
        return cls(**{f.name: max(getattr(gap, f.name) for gap in gaps) for f in fields(cls)})

    def metrics(self) -> dict[str, float]:
        """As they are in a run's metrics."""
        names = ("median", "p90", "max", "kl", "logits")
        return {f"logprob_gap/{name}": getattr(self, name) for name in names}


def check_gap(
    answers: Sequence[Completion], expected: Scores, *, probe: Probe, version: int
) -> Gap:
    """The gap of one worker that answered all prompts of a probe; PublishFailure above its limit.

    `expected` are of prompt and answer together.
    """
    sampled = [logprob for answer in answers for logprob in answer.logprobs]
    known: list[float] = []
    for prompt, logprobs in zip(probe.prompts, expected.logprobs, strict=True):
        known += logprobs[len(prompt) - 1 :]
    gap = Gap.between(sampled, known)
    limit = probe.limit(expected.largest_logit)
    versions = {each for answer in answers for each in answer.versions}
    if versions == {version} and gap.logits <= limit:  # nan is not
        return gap
    why = "engine.gap_limit"
    if limit > probe.gap_limit:
        why = f"{probe.of_largest:.2g} of the largest, {expected.largest_logit:.3g}"
    raise PublishFailure(
        f"{answers[0].worker} should sample with version {version}: it says {sorted(versions)}, "
        f"and 90% of its logits are within {gap.logits:.2g} of the trainer's, where {limit:.2g} is "
        f"the limit ({why}). Its logprobs of {gap.tokens} tokens, after prompts of "
        f"{max(map(len, probe.prompts))}, differ by {gap.median:.2g} (median), {gap.p90:.2g} (90%) "
        f"and {gap.max:.2g} at most; the KL divergence is {gap.kl:.2g} nats a token. Either it has "
        f"other weights or another temperature, or its attention has other windows or positions: "
        f"start it anew, or leave it out. If the two compute in precisions coarser than they say, "
        f"set engine.gap_limit"
    )
