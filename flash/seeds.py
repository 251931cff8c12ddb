"""Which random numbers belong to whom: seeds of tasks, and seeds that a run's seed gives others.

Environments are given seeds below 2**31, which numpy's, gymnasium's and C libraries' generators all
take: in the lower half those of training, above it those of held-out tasks, then demonstrations'.
"""

import hashlib
from typing import Final

TRAINING_SEEDS: Final = 1 << 30
HELDOUT_SEEDS: Final = range(TRAINING_SEEDS, 3 << 29)
DEMONSTRATION_SEEDS: Final = range(3 << 29, 1 << 31)
LARGEST: Final = (1 << 63) - 1  # of a run; torch takes no more

_GOLDEN = 0x9E3779B97F4A7C15  # 2**64 / φ


def first_task(run_seed: int, task_set: str = "") -> int:
    """The seed of a run's first task, or of its task set's first; the next ones follow it, and
    wrap at TRAINING_SEEDS.

    Multiples of the golden ratio keep any number of points apart (Knuth, vol. 3, 6.4): of the run
    seeds 0 to 1000 no two are within 400,000 tasks of each other.
    """
    if task_set:
        run_seed = derived(run_seed, f"task set {task_set}")
    return (run_seed * _GOLDEN % (1 << 64)) >> 34


def derived(run_seed: int, name: str) -> int:
    """A seed below 2**31 for what has that name in the run, unlike that of any other."""
    digest = hashlib.blake2b(f"{run_seed} {name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest) >> 1
