"""Which trajectories of an expert a batch imitates: all of them in a seeded order, again and again.

A batch's are told by its version alone, so that a run that goes on needs to know nothing of before.
"""

import functools
import random
from collections.abc import Sequence

from flash.seeds import derived
from flash.types import ExpertSequence, ExpertShare


class ShuffledExpert:
    """Gives each version's batch so many trajectories, each of one sequence or more.

    >>> expert = ShuffledExpert(trajectories, episodes=8, weight=0.1, seed=0)
    >>> async with RolloutLoop(hub, …, expert=expert) as rollouts:
    """

    def __init__(
        self,
        trajectories: Sequence[Sequence[ExpertSequence]],
        *,
        episodes: int,
        weight: float,
        seed: int,
    ) -> None:
        self._trajectories = trajectories
        self._episodes = episodes
        self._weight = weight
        self._order = functools.lru_cache(maxsize=2)(functools.partial(self._shuffled, seed))

    def __call__(self, version: int) -> ExpertShare:
        first = version * self._episodes
        chosen = [self._at(place) for place in range(first, first + self._episodes)]
        return ExpertShare(
            sequences=[sequence for trajectory in chosen for sequence in trajectory],
            weight=self._weight,
        )

    def _at(self, place: int) -> Sequence[ExpertSequence]:
        epoch, within = divmod(place, len(self._trajectories))
        return self._trajectories[self._order(epoch)[within]]

    def _shuffled(self, seed: int, epoch: int) -> list[int]:
        order = list(range(len(self._trajectories)))
        random.Random(derived(seed, f"expert {epoch}")).shuffle(order)
        return order
