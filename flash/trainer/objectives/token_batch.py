"""What an objective is given and what it answers, and the sums over packed sequences.

All logs are natural.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_LOG = 60.0  # beyond every bound in use


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """What an objective may use. Only `logprobs_T` has a gradient.

    Args:
        logprobs_T: log π of each token, under the weights that are trained.
        behaviour_logprobs_T: as the engine sampled it.
        proximal_logprobs_T: under the weights at the start of the step; for objectives that don't
            need it, `logprobs_T` without its gradient may stand in.
        advantages_T, rewards_T: of the token, and of its sequence.
        ages_T: policy versions between the token's sampling and this step.
        sequences_T: index 0 … Q - 1 of the token's sequence; each is whole, its tokens in order.
        progress: share of this step's optimizer steps that are done.
    """

    logprobs_T: Tensor
    behaviour_logprobs_T: Tensor
    proximal_logprobs_T: Tensor
    advantages_T: Tensor
    rewards_T: Tensor
    ages_T: Tensor
    sequences_T: Tensor
    num_sequences: int
    progress: float = 0.0

    def log_ratios(self) -> Tensor:
        """log π/π_behaviour of each token, [T], with π's gradient."""
        return self.logprobs_T - self.behaviour_logprobs_T

    def sequence_sums(self, values_T: Tensor) -> Tensor:
        """The sum over each token's sequence, at each of its tokens, [T]."""
        sums_Q = values_T.new_zeros(self.num_sequences)
        return sums_Q.index_add(0, self.sequences_T, values_T)[self.sequences_T]

    def sequence_means(self, values_T: Tensor) -> Tensor:
        """The mean over each token's sequence, at each of its tokens, [T]."""
        return self.sequence_sums(values_T) / self.sequence_lengths()

    def sequence_lengths(self) -> Tensor:
        """The number of trained tokens in each token's sequence, [T]."""
        return self.sequence_sums(torch.ones_like(self.behaviour_logprobs_T))

    def sums_from_here(self, values_T: Tensor) -> Tensor:
        """The sum over the token and all later ones of its sequence, [T]."""
        values = values_T.double()  # because it comes out as a difference of sums over the pack
        up_to_T = values.cumsum(0)
        last_T = torch.ones_like(self.sequences_T, dtype=torch.bool)
        last_T[:-1] = self.sequences_T[1:] != self.sequences_T[:-1]
        ends_Q = values.new_zeros(self.num_sequences)
        ends_Q[self.sequences_T[last_T]] = up_to_T[last_T]
        return (ends_Q[self.sequences_T] - up_to_T + values).to(values_T.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLoss:
    """The loss of each token, [T], lower is better, and what the objective did to it.

    Args:
        loss_T: with π's gradient. The caller adds it up, weighted by the aggregation.
        weight_T: what A·∇log π is multiplied by in its gradient; no gradient of its own. None for
            an objective without A.
        stopped_T: 1 where a clip or a mask left the token no policy gradient.
        capped_T: 1 where its importance weight was cut to a bound.
    """

    loss_T: Tensor
    weight_T: Tensor | None = None
    stopped_T: Tensor | None = None
    capped_T: Tensor | None = None


def exp(logs_T: Tensor) -> Tensor:
    """exp, but never infinite in float32, because 0 times infinity is not a number."""
    return logs_T.clamp(max=_LARGEST_LOG).exp()


Objective = Callable[[TokenBatch], TokenLoss]
