"""What can be said without simulating, in closed form; the tests hold it against simulations.

N samples in a batch, α the asynchronous ratio, (1+α)·N samples under way
K responses at a time, all workers together
μ, L: seconds of a sample's rollout, on average and at most
D: seconds from the hand-over of a batch until its weights are published
S: seconds from one hand-over to the next
"""

import math


def rollout_bound_s(mean_s: float, longest_s: float, *, at_a_time: int, under_way: int) -> float:
    """Seconds a sample, at most: μ/K + L/Q, for Q samples of which K at a time are worked on.

    Whoever is free takes the next: so all K are busy until the last sample begins, and that one
    takes at most L. Q is N in synchronous training, (1+α)·N otherwise. ROLL Flash
    (arXiv 2510.11345), proposition 1; Graham 1966.
    """
    return mean_s / at_a_time + longest_s / under_way


def run_bound_s(
    samples: int,
    *,
    mean_s: float,
    longest_s: float,
    train_s: float,
    resources: int,
    alpha: float,
    epochs: int = 1,
) -> float:
    """Seconds for N samples end to end, at most: (N/K)(μ + E·μ_train) + L/(1+α).

    `train_s` is of one sample on one resource. For α > 0 it holds when the K resources are split
    as the two kinds of work need them. ROLL Flash (arXiv 2510.11345), proposition 2.
    """
    return samples / resources * (mean_s + epochs * train_s) + longest_s / (1 + alpha)


def step_s(*, alpha: float, rollout_s: float, update_s: float, busy_s: float = 0.0) -> float:
    """S, where every rollout takes the same seconds R: max(D, (R + D)/(1+α), busy_s).

    The trainer needs D for each batch. A slot is taken from the admission of its sample until the
    weights made from it are published, R + D at least; N of the (1+α)·N slots are freed in each
    step, so a slot is taken for (1+α)·S (Little 1961). `busy_s` is what the workers need for a
    batch, N·μ/K. With varying rollouts S is longer, for batches wait for slow ones.
    """
    return max(update_s, (rollout_s + update_s) / (1 + alpha), busy_s)


def enough_alpha(*, rollout_s: float, update_s: float) -> float:
    """The α above which the trainer never waits, where rollouts take the same time: R/D."""
    return rollout_s / update_s


def mean_age(*, alpha: int, rollout_s: float, step_s: float) -> float:
    """Of the trained tokens, in versions, where every rollout takes R and samples evenly.

    Slots become free when weights are published, so samples are admitted then and at no other
    time, and a sample stays for 1+α steps: its first token is α versions old when it is handed
    over. A token sampled u seconds after admission has seen floor(u/S) more publishes:
    α - E[floor(u/S)], u uniform over R. So tokens are as old as α lets them be, unless rollouts
    are longer than steps: an α that is larger than it needs to be costs age and brings nothing.
    """
    steps = rollout_s / step_s
    whole = math.floor(steps)
    return alpha - (whole * (whole - 1) / 2 + whole * (steps - whole)) / steps
