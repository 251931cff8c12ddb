"""What the probe makes of two lists of logprobs."""

import math

import numpy as np
import pytest

from flash.errors import PublishFailure
from flash.hub.probe import Gap, Probe, check_gap
from flash.types import Completion, Scores


def answer(logprobs, version: int = 1) -> Completion:
    return Completion(
        token_ids=[5] * len(logprobs), logprobs=logprobs, versions=[version] * len(logprobs),
        temperature=1.0, finish_reason="length", worker="w",
    )  # fmt: skip


def test_the_numbers_of_a_gap_are_those_worked_by_hand():
    half = math.log(0.5)
    gap = Gap.between([half] * 4, [half, half + 0.1, half - 0.2, half + 0.3])
    assert (gap.tokens, gap.median, gap.max) == (4, pytest.approx(0.15), pytest.approx(0.3))
    assert gap.p90 == pytest.approx(0.27), "linear between 0.2 and 0.3"
    k3 = [math.exp(d) - 1 - d for d in (0.0, 0.1, -0.2, 0.3)]
    assert gap.kl == pytest.approx(sum(k3) / 4)
    # Half of what the logit of a token does reaches a logprob of one half.
    assert gap.logits == pytest.approx((gap.p90 - 1e-5) / 0.501)


def test_a_logit_that_is_off_is_seen_however_sure_the_policy_is():
    """Logits that are off by normal noise of 0.1, in distributions from even to all but certain."""
    rng = np.random.default_rng(0)
    for spread in (0.1, 2.0, 8.0):
        logits_TV = rng.normal(size=(4000, 50)) * spread
        noisy_TV = logits_TV + rng.normal(size=logits_TV.shape) * 0.1
        worker_TV, trainer_TV = (
            x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (noisy_TV, logits_TV)
        )
        chosen_T = [rng.choice(50, p=np.exp(row)) for row in worker_TV]
        rows = np.arange(4000)
        gap = Gap.between(worker_TV[rows, chosen_T], trainer_TV[rows, chosen_T])
        assert 0.15 < gap.logits < 0.25, "between 1.6 and 2.3 of the noise"


def test_what_float32_makes_of_logprobs_near_0_is_no_gap():
    """The difference of two numbers near 60 is a multiple of 4e-6."""
    certain, rounded = [0.0, -4e-6] * 50, [-4e-6, 0.0] * 50
    gap = Gap.between(certain, rounded)
    assert (gap.max, gap.logits) == (4e-6, 0)
    assert Gap.between(certain, [-1e-4] * 100).logits > 0.08


def test_the_divergence_is_never_below_nothing():
    rng = np.random.default_rng(1)
    for size in (1e-12, 1e-9, 1e-4, 1.0, 50.0):
        logprobs = -rng.exponential(size=100)
        assert Gap.between(logprobs, logprobs + rng.normal(size=100) * size).kl >= 0


def test_what_is_infinitely_unlikely_or_not_a_number_is_above_every_limit():
    probe = Probe(prompts=[[1]], gap_limit=1e9)
    for trainer in (math.nan, -math.inf, math.inf):
        expected = Scores(logprobs=[[-0.5, trainer]])
        with pytest.raises(PublishFailure, match="within nan of the trainer's"):
            check_gap([answer([-0.5, -0.5])], expected, probe=probe, version=1)
    assert Gap.between([-9000.0], [0.0]).kl == math.inf, "and no overflow"


def test_a_few_tokens_far_off_are_told_and_end_nothing():
    """A router in half precision may choose other experts for a token now and then."""
    logprobs = [-0.7] * 100
    gap = check_gap(
        [answer(logprobs)],
        Scores(logprobs=[[*logprobs[:91], *[-3.0] * 9]]),
        probe=Probe(prompts=[[1]]),
        version=1,
    )
    assert (gap.max, gap.logits) == (pytest.approx(2.3), 0)


def test_the_limit_grows_with_the_largest_logit_where_rounding_does():
    probe = Probe(prompts=[[1]], gap_limit=1e-3, of_largest=1 / 64)
    worker, trainer = [-0.7] * 10, [-1.0] * 10

    def check(largest_logit: float) -> Gap:
        expected = Scores(logprobs=[trainer], largest_logit=largest_logit)
        return check_gap([answer(worker)], expected, probe=probe, version=1)

    assert check(64.0).logits == pytest.approx(0.29999 / (1 - math.exp(-0.7) + 1e-3))
    with pytest.raises(PublishFailure, match=r"within 0\.59 .* 0\.5 is the limit \(0\.016 of the "):
        check(32.0)


def test_the_worst_of_several_workers_is_told_number_by_number():
    one = Gap(tokens=3, median=1, p90=2, max=3, kl=4, logits=5)
    other = Gap(tokens=4, median=0, p90=3, max=3, kl=5, logits=1)
    assert Gap.worst([one, other]) == Gap(tokens=4, median=1, p90=3, max=3, kl=5, logits=5)
    assert Gap.worst([]) is None
