"""PPO and its kin: a clip stops tokens that have moved far enough the way they were pushed.

sg: without gradient.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flash.trainer.objectives.token_batch import TokenBatch, TokenLoss, exp


def ppo(
    batch: TokenBatch, *, clip_low: float, clip_high: float, dual_clip: float | None
) -> TokenLoss:
    """-min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A) with r = π/π_behaviour.

    `dual_clip` c bounds the loss of tokens with A < 0 by -c·A. Schulman et al. 2017, eq. 7;
    separate bounds: DAPO (Yu et al. 2025), eq. 10; dual clip: Ye et al. 2020, eq. 5.
    """
    return _clipped(
        batch.log_ratios(),
        batch.advantages_T,
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
    )


def decoupled_ppo(
    batch: TokenBatch,
    *,
    clip_low: float,
    clip_high: float,
    max_behaviour_weight: float,
    proximal: Literal["recomputed", "interpolated"],
) -> TokenLoss:
    """PPO's clipped loss against π_prox, weighted by min(π_prox/π_behaviour, cap).

    The clip limits how far a step moves, the weight corrects for who sampled. With
    π_prox = π_behaviour it is PPO. Hilton et al. 2022, eq. 3; AReaL (Fu et al. 2025), eq. 5;
    the cap as in truncated importance sampling (Espeholt et al. 2018).
    """
    proximal_T = batch.proximal_logprobs_T
    if proximal == "interpolated":
        proximal_T = interpolated_proximal(batch)
    weight_T = exp(proximal_T - batch.behaviour_logprobs_T)
    loss = _clipped(
        batch.logprobs_T - proximal_T,
        batch.advantages_T,
        clip_low=clip_low,
        clip_high=clip_high,
        times_T=weight_T.clamp(max=max_behaviour_weight),
    )
    return replace(loss, capped_T=weight_T > max_behaviour_weight)


def interpolated_proximal(batch: TokenBatch) -> Tensor:
    """log π_prox without a forward pass: between π_behaviour and π, by their distance in versions.

    A token of age k, p of a step later: log π_prox ≈ log π_b + k/(k + p)·(log π - log π_b). It is
    exact at the start of a step (p = 0) and for tokens of the present version (k = 0). A-3PO
    (Li et al. 2025), with versions counted down to the optimizer step.
    """
    ages_T = batch.ages_T.to(batch.logprobs_T.dtype)
    if batch.progress == 0:
        return batch.logprobs_T.detach()
    share_T = ages_T / (ages_T + batch.progress)
    return batch.behaviour_logprobs_T + share_T * batch.log_ratios().detach()


def icepop(
    batch: TokenBatch, *, low: float, high: float, clip_low: float, clip_high: float
) -> TokenLoss:
    """PPO's clipped loss against π_prox, weighted by k = π_prox/π_behaviour, or 0 outside of
    low ≤ k ≤ high.

    Ring-1T (2025), eq. 3: tokens on which trainer and engine disagree are left out. They stay in
    the denominator of the mean.
    """
    weight_T = exp(batch.proximal_logprobs_T - batch.behaviour_logprobs_T)
    kept_T = (weight_T >= low) & (weight_T <= high)
    loss = _clipped(
        batch.logprobs_T - batch.proximal_logprobs_T,
        batch.advantages_T,
        clip_low=clip_low,
        clip_high=clip_high,
        times_T=torch.where(kept_T, weight_T, torch.zeros_like(weight_T)),
    )
    return replace(loss, stopped_T=~kept_T | (loss.weight_T == 0))


def gspo(batch: TokenBatch, *, clip_low: float, clip_high: float) -> TokenLoss:
    """PPO's clip on s, the geometric mean of r = π/π_behaviour over the sequence.

    In the form for tokens, s·π/sg(π), which has the same gradient and allows an advantage for
    each token. Zheng et al. 2025 (GSPO), eqs. 5 to 7 and 13.
    """
    mean_T = batch.sequence_means(batch.log_ratios().detach())
    return _clipped(
        mean_T + batch.logprobs_T - batch.logprobs_T.detach(),
        batch.advantages_T,
        clip_low=clip_low,
        clip_high=clip_high,
    )


def _clipped(
    log_ratio_T: Tensor,
    advantages_T: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    times_T: Tensor | None = None,
) -> TokenLoss:
    """The clipped loss, times `times_T`."""
    ratio_T = exp(log_ratio_T)
    unclipped_T = -advantages_T * ratio_T
    clipped_T = -advantages_T * ratio_T.clamp(1 - clip_low, 1 + clip_high)
    loss_T = torch.maximum(unclipped_T, clipped_T)
    stopped_T = clipped_T > unclipped_T
    if dual_clip is not None:
        bound_T = torch.where(advantages_T < 0, -advantages_T * dual_clip, torch.inf)
        stopped_T = stopped_T | (loss_T > bound_T)
        loss_T = torch.minimum(loss_T, bound_T)
    weight_T = torch.where(stopped_T, torch.zeros_like(ratio_T), ratio_T).detach()
    if times_T is not None:
        loss_T, weight_T = times_T * loss_T, times_T * weight_T
    return TokenLoss(loss_T=loss_T, weight_T=weight_T, stopped_T=stopped_T)
