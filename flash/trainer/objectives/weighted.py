"""Policy gradients, -w·A·log π, that differ in the weight w; and two with a regulariser instead.

r = π/π_behaviour of a token, ρ of a whole sequence; sg: without gradient.
"""

from typing import Literal

import torch

from flash.trainer.objectives.token_batch import TokenBatch, TokenLoss, exp


def vanilla(batch: TokenBatch) -> TokenLoss:
    """-A·log π: right only for tokens that π itself sampled. Williams 1992."""
    return TokenLoss(
        loss_T=-batch.advantages_T * batch.logprobs_T,
        weight_T=torch.ones_like(batch.advantages_T),
    )


def tis(batch: TokenBatch, *, cap: float) -> TokenLoss:
    """-sg(min(r, cap))·A·log π: truncated importance sampling.

    Ionides 2008; with A and a cap per token as in IMPALA (Espeholt et al. 2018, section 4.1).
    """
    ratio_T = _ratio(batch)
    return _weighted(batch, ratio_T.clamp(max=cap), capped_T=ratio_T > cap)


def cispo(batch: TokenBatch, *, clip_low: float, clip_high: float) -> TokenLoss:
    """-sg(clip(r, 1 - clip_low, 1 + clip_high))·A·log π: no token is left out.

    MiniMax-M1 (2025), eqs. 4 and 5.
    """
    ratio_T = _ratio(batch)
    low, high = 1 - clip_low, 1 + clip_high
    return _weighted(batch, ratio_T.clamp(low, high), capped_T=(ratio_T < low) | (ratio_T > high))


def topr(
    batch: TokenBatch,
    *,
    granularity: Literal["token", "sequence"],
    sign: Literal["advantage", "reward"],
) -> TokenLoss:
    """Positive samples as they are, negative ones weighted by sg(min(ρ, 1)).

    What is bad and no longer likely is left alone; what is good is learned, whoever found it.
    Le Roux et al. 2025 (TOPR), eq. 8, where R is the reward less a baseline, and ρ is of the
    sequence.
    """
    of_T = batch.advantages_T if sign == "advantage" else batch.rewards_T
    positive_T = of_T > 0
    log_ratio_T = batch.log_ratios().detach()
    if granularity == "sequence":
        log_ratio_T = batch.sequence_sums(log_ratio_T)
    tapered_T = log_ratio_T.clamp(max=0).exp()
    return _weighted(
        batch,
        torch.where(positive_T, torch.ones_like(tapered_T), tapered_T),
        capped_T=~positive_T & (log_ratio_T > 0),
    )


def masked_is(
    batch: TokenBatch,
    *,
    granularity: Literal["token", "geometric", "sequence"],
    low: float,
    high: float,
) -> TokenLoss:
    """-sg(w)·A·log π where low ≤ ρ ≤ high, nothing elsewhere.

    `token`: ρ = w = r. `geometric`: ρ is the geometric mean of r over the sequence, w = r.
    `sequence`: ρ = w is their product, unbiased but for the mask. Left-out tokens stay in the
    denominator of the mean. Liu, Li et al. 2025 (When Speed Kills Stability), sections on MIS.
    """
    log_ratio_T = batch.log_ratios().detach()
    judged_T = weighing_T = log_ratio_T
    if granularity == "sequence":
        judged_T = weighing_T = batch.sequence_sums(log_ratio_T)
    elif granularity == "geometric":
        judged_T = batch.sequence_means(log_ratio_T)
    judged_T = exp(judged_T)
    kept_T = (judged_T >= low) & (judged_T <= high)
    weight_T = torch.where(kept_T, exp(weighing_T), torch.zeros_like(judged_T))
    return _weighted(batch, weight_T, stopped_T=~kept_T)


def opmd(batch: TokenBatch, *, tau: float) -> TokenLoss:
    """-A·log π / (1 + τ): one step of mirror descent from the present policy.

    Nothing in it depends on who sampled. Trinity-RFT (Pan et al. 2025), appendix A, as its code
    has it; meant for A = reward - group mean.
    """
    weight_T = torch.full_like(batch.advantages_T, 1 / (1 + tau))
    return _weighted(batch, weight_T)


def kimi15(
    batch: TokenBatch, *, tau: float, granularity: Literal["token", "sequence"]
) -> TokenLoss:
    """-A·log π + τ/2·(log ρ)²: the farther from the sampler, the stronger the pull back to it.

    ρ is of the sequence, or r of each token (`token`, as ROLL has it). Kimi k1.5 (2025), eq. 3;
    DRO (Richemond et al. 2024) is the same with a learned baseline.
    """
    log_ratio_T = batch.log_ratios()
    if granularity == "sequence":
        # The square, shared out evenly over the tokens of the sequence.
        square_T = batch.sequence_sums(log_ratio_T) ** 2 / batch.sequence_lengths()
    else:
        square_T = log_ratio_T**2
    return TokenLoss(
        loss_T=-batch.advantages_T * batch.logprobs_T + tau / 2 * square_T,
        weight_T=torch.ones_like(batch.advantages_T),
    )


def _ratio(batch: TokenBatch) -> torch.Tensor:
    return exp(batch.log_ratios().detach())


def _weighted(
    batch: TokenBatch,
    weight_T: torch.Tensor,
    *,
    stopped_T: torch.Tensor | None = None,
    capped_T: torch.Tensor | None = None,
) -> TokenLoss:
    return TokenLoss(
        loss_T=-weight_T * batch.advantages_T * batch.logprobs_T,
        weight_T=weight_T,
        stopped_T=stopped_T,
        capped_T=capped_T,
    )
