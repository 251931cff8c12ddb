"""A loss of one's own: the older a token is, the less it counts.

    flash train frozen_lake --alpha 2 --trainer.objective \\
        '{name: function, run: "own_loss:discounted_by_age"}'

It is called in the trainer's ranks, which find it where the command is run, or in any installed
package. docs/objectives.md says what is given and asked for.
"""

import math

from flash import TokenBatch, TokenLoss

CAP = 2.0
DISCOUNT = 0.7


def discounted_by_age(batch: TokenBatch) -> TokenLoss:
    """-d^k·min(r, cap)·A·log π of each token, [T]; r = π/π_behaviour, k its age in versions."""
    log_ratios_T = batch.log_ratios().detach()
    truncated_T = log_ratios_T.clamp(max=math.log(CAP)).exp()
    weight_T = truncated_T * DISCOUNT**batch.ages_T
    return TokenLoss(
        loss_T=-weight_T * batch.advantages_T * batch.logprobs_T,
        weight_T=weight_T,
        capped_T=log_ratios_T > math.log(CAP),
    )
