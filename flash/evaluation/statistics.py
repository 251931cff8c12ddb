"""What episodes say of a policy: means over tasks, pass@k, and how far to trust them.

Samples of one task are alike, so tasks are the units that vary, not episodes: each counts with the
mean of its samples, and an interval comes from how these differ. With as many samples of each task
that is the standard error clustered by task.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import NormalDist, fmean, variance

import msgspec

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
# Student's t at 0.975 of 1 to 5 degrees of freedom, where the expansion below is coarse.
_FIRST_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)


class Estimate(msgspec.Struct, frozen=True):
    """A mean over so many tasks, and the ends of its confidence interval, if it has one."""

    tasks: int
    mean: float
    low: float | None
    high: float | None


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """The chance that one of k samples of a task succeeds, without bias, by `samples` of them.

    1 - C(n-c, k) / C(n, k): Chen et al. 2021, "Evaluating large language models trained on code",
    eq. 1. ValueError if k is not 1 to `samples`, or there are more successes than samples.
    """
    if not (1 <= k <= samples and 0 <= successes <= samples):
        raise ValueError(f"pass@{k} of {successes} successes in {samples} samples: there is none")
    return 1.0 - math.comb(samples - successes, k) / math.comb(samples, k)


def powers_of_two(most: int) -> Iterator[int]:
    """1, 2, 4, … up to `most`."""
    return (1 << bit for bit in range(most.bit_length()))


def mean_of_tasks(values: Sequence[float]) -> Estimate:
    """The mean of one value for each task, with Student's interval; none where all are equal,
    which tells nothing of how far others might be."""
    mean = fmean(values)
    if len(set(values)) < 2:
        return Estimate(len(values), mean, None, None)
    half = student_t(len(values) - 1) * math.sqrt(variance(values) / len(values))
    return Estimate(len(values), mean, mean - half, mean + half)


def rate_of_tasks(rates: Sequence[float]) -> Estimate:
    """Likewise of values in [0, 1], with an interval that stays in it and is never empty.

    Wilson's, for as many independent trials as would vary like these tasks: n = p(1-p) / SE²,
    where SE is the standard error clustered by task (Korn and Graubard 1998); where all tasks
    agree, one trial for each task.
    """
    mean = fmean(rates)
    tasks = len(rates)
    if tasks < 2:
        return Estimate(tasks, mean, None, None)
    squared_error = variance(rates) / tasks
    trials = mean * (1 - mean) / squared_error if squared_error else float(tasks)
    t = student_t(tasks - 1)
    share = t * t / trials
    middle = (mean + share / 2) / (1 + share)
    half = t / (1 + share) * math.sqrt(mean * (1 - mean) / trials + share / (4 * trials))
    return Estimate(tasks, mean, max(0.0, middle - half), min(1.0, middle + half))


def student_t(degrees: int) -> float:
    """Its quantile for a two-sided interval of CONFIDENCE, to a thousandth.

    From 6 degrees of freedom on Abramowitz and Stegun, 26.7.5.
    """
    if degrees <= len(_FIRST_T):
        return _FIRST_T[degrees - 1]
    z, d = _Z, degrees
    return (
        z
        + (z**3 + z) / (4 * d)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * d**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * d**3)
    )
