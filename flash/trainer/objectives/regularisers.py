"""What is added to any objective: a divergence from a reference policy, and entropy.

x = log π/π_ref.
"""

import torch
from torch import Tensor

from flash.trainer.objectives.settings import Estimator
from flash.trainer.objectives.token_batch import TokenBatch, exp


def kl_estimate(logprobs_T: Tensor, other_logprobs_T: Tensor, estimator: Estimator) -> Tensor:
    """Estimates KL(p ‖ q) from tokens of p: for each, from x = log p - log q.

    k1 = x, unbiased; k2 = x²/2, biased, of low variance; k3 = exp(-x) - 1 + x, unbiased, never
    negative. Schulman 2020 (Approximating KL divergence).
    """
    x_T = logprobs_T - other_logprobs_T
    match estimator:
        case "k1":
            return x_T
        case "k2":
            return x_T**2 / 2
        case "k3":
            return torch.expm1(-x_T) + x_T


def kl_loss(
    batch: TokenBatch, reference_logprobs_T: Tensor, *, estimator: Estimator, corrected: bool
) -> Tensor:
    """What the divergence KL(π ‖ π_ref) adds to the loss of each token, [T].

    `corrected`: times π/π_behaviour; then the gradient's mean is that of the divergence, whoever
    sampled. For k1 and k3 that takes the ratio's own gradient (DeepSeek-V3.2, eq. 7); k2 has the
    right one by itself on tokens of π, so for it the ratio is a weight. Otherwise k3 is GRPO's term
    (Shao et al. 2024, eq. 4), and k2 is right on tokens of π itself.
    """
    kl_T = kl_estimate(batch.logprobs_T, reference_logprobs_T, estimator)
    if not corrected:
        return kl_T
    ratio_T = exp(batch.log_ratios())
    return (ratio_T.detach() if estimator == "k2" else ratio_T) * kl_T


def kl_penalty(batch: TokenBatch, reference_logprobs_T: Tensor, *, estimator: Estimator) -> Tensor:
    """What the divergence takes from the return of each token, [T]: of it and all later ones.

    Ouyang et al. 2022 (InstructGPT), in the form of REINFORCE++ (Hu et al. 2025, eq. 4).
    """
    kl_T = kl_estimate(batch.logprobs_T.detach(), reference_logprobs_T, estimator)
    return batch.sums_from_here(kl_T)
