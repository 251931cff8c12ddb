"""Objectives: pure functions from what is known of each token to its loss.

Legend: T tokens of one or more packed sequences; natural logs. A function gives the loss of each
token, [T], and metrics of each token, [T]. The caller averages both with the mask as weights over
the whole mini-batch, so that packing, micro-batches and ranks change nothing.

π is the policy that is trained, π_prox the trainer's weights at the start of the step, π_behaviour
the weights that sampled the token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flash.trainer.config import TrainerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """What an objective may use; all [T]. Only `logprobs_T` has a gradient."""

    logprobs_T: Tensor
    proximal_logprobs_T: Tensor
    behaviour_logprobs_T: Tensor
    advantages_T: Tensor


Metrics = dict[str, Tensor]
Objective = Callable[[TokenBatch], tuple[Tensor, Metrics]]


def decoupled_ppo_loss(
    batch: TokenBatch, *, clip_low: float, clip_high: float, max_behaviour_weight: float
) -> tuple[Tensor, Metrics]:
    """PPO's clipped loss against π_prox, weighted by min(π_prox/π_behaviour, cap).

    The clip limits how far a step moves, the weight corrects for who sampled. With
    π_prox = π_behaviour it is PPO. Hilton et al. 2022, eq. 3; AReaL (Fu et al. 2025), eq. 5;
    the cap as in truncated importance sampling (Espeholt et al. 2018).
    """
    weight_T = torch.exp(batch.proximal_logprobs_T - batch.behaviour_logprobs_T)
    weight_T = weight_T.clamp(max=max_behaviour_weight)
    ratio_T = torch.exp(batch.logprobs_T - batch.proximal_logprobs_T)
    clipped_T = ratio_T.clamp(1 - clip_low, 1 + clip_high)
    unclipped_loss_T = -batch.advantages_T * ratio_T
    clipped_loss_T = -batch.advantages_T * clipped_T
    loss_T = weight_T * torch.maximum(unclipped_loss_T, clipped_loss_T)
    return loss_T, {
        "ratio/mean": ratio_T.detach(),
        "ratio/clip_fraction": (clipped_loss_T > unclipped_loss_T).float(),
        "weight/mean": weight_T,
        "weight/capped_fraction": (weight_T >= max_behaviour_weight).float(),
        "kl_behaviour": kl_k3(batch.logprobs_T.detach(), batch.behaviour_logprobs_T),
    }


def supervised_loss(batch: TokenBatch) -> tuple[Tensor, Metrics]:
    """Cross-entropy; the mask may hold any weights."""
    return -batch.logprobs_T, {}


def kl_k3(logprobs_T: Tensor, sampled_by_logprobs_T: Tensor) -> Tensor:
    """Estimates KL(sampler ‖ π) from tokens of the sampler: r - 1 - log r ≥ 0 for each token.

    r = π/π_sampler. Unbiased, and of low variance near r = 1. Schulman 2020, "k3".
    """
    log_ratio_T = logprobs_T - sampled_by_logprobs_T
    return torch.expm1(log_ratio_T) - log_ratio_T


def make_objective(config: TrainerConfig) -> Objective:
    """The objective that the configuration names, with its settings."""
    if config.objective == "supervised":
        return supervised_loss
    return lambda batch: decoupled_ppo_loss(
        batch,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        max_behaviour_weight=config.max_behaviour_weight,
    )
