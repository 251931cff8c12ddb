"""`flash plan`: how to split the GPUs, how much asynchrony to allow, how much to begin in vain.

For each α the split is searched that trains the most samples a second: with too few workers the
trainer waits, with too many they wait. Between the two the curve has one top, so each round of the
search keeps the side where it is higher. Then redundancy is tried at each α's best split: what it
brings depends on the tail, and costs tokens that nobody trains.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flash.simulate.results import Result
from flash.simulate.run import simulate
from flash.simulate.scenario import Scenario

_MOST_SPLITS = 16
_NEARLY = 0.95  # of the best speed, which what is younger or wastes less may have
_WAITS = 0.1
_REDUNDANT = (1 / 8, 1 / 4, 1 / 2)  # of a group's episodes, and of a batch's groups


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One simulated possibility."""

    alpha: float
    workers: int
    trainer_gpus: int
    result: Result
    redundant_groups: int = 0
    redundant_episodes: int = 0

    @property
    def why(self) -> str:
        """What limits it, in words."""
        if self.result.idle_trainer < _WAITS:
            return "the trainer never waits: more α would only add age"
        if self.result.idle_workers < _WAITS:
            return "the workers are always busy: the trainer waits for them"
        return "both wait, for the slowest episodes: more α would help"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`best` has the choice of each α, and `recommended` is the one to take: the least age among
    those that are nearly as quick as the quickest, and of those the one that wastes the least."""

    tried: Sequence[Choice]
    best: Sequence[Choice]
    recommended: Choice


def plan(
    scenario: Scenario,
    *,
    gpus: int,
    alphas: Sequence[float],
    on_choice: Callable[[Choice], None] = lambda choice: None,
) -> Plan:
    """Calls `on_choice` with each choice as it is simulated. ValueError as of `check`."""
    check(scenario, gpus=gpus, alphas=alphas)
    splits = _splits(gpus, scenario.workers.gpus)
    tried: list[Choice] = []
    best: list[Choice] = []

    def choices(alpha: float) -> Callable[[int], Choice]:
        @functools.cache
        def choice(index: int) -> Choice:
            tried.append(_choice(scenario, alpha, *splits[index]))
            on_choice(tried[-1])
            return tried[-1]

        return choice

    for alpha in alphas:
        low, high = 0, len(splits) - 1
        if best:  # where the last α had its top, this one's is not far
            at = splits.index((best[-1].workers, best[-1].trainer_gpus))
            low, high = max(0, at - 3), min(high, at + 3)
        choice = choices(alpha)
        while low < high:
            middle = (low + high) // 2
            if choice(middle).result.samples_per_s >= choice(middle + 1).result.samples_per_s:
                high = middle
            else:
                low = middle + 1
        found = _with_redundancy(scenario, choice(low), on_choice)
        tried += found[1:]
        best.append(_least_waste(found))
    quick = _nearly_quickest(best)
    recommended = min(quick, key=lambda c: (c.result.staleness_mean, c.result.wasted_share))
    return Plan(tried=tried, best=best, recommended=recommended)


def check(scenario: Scenario, *, gpus: int, alphas: Sequence[float]) -> None:
    """ValueError if an α can't be, or the GPUs don't suffice for one worker and a trainer."""
    _splits(gpus, scenario.workers.gpus)
    for alpha in alphas:
        scenario.changed({"alpha": alpha})


def _splits(gpus: int, of_worker: int) -> list[tuple[int, int]]:
    """(workers, GPUs of the trainer), from few workers to many; a selection of them."""
    if of_worker < 1:
        raise ValueError("workers.gpus=0: say how many GPUs a worker has")
    most = (gpus - 1) // of_worker
    if most < 1:
        raise ValueError(
            f"--gpus {gpus}: a worker takes {of_worker} and the trainer at least 1; give more, or "
            f"fewer to a worker (workers.gpus)"
        )
    step = max(1, round(most / _MOST_SPLITS))
    counts = sorted({*range(step, most + 1, step), most})
    return [(count, gpus - count * of_worker) for count in counts]


def _with_redundancy(
    scenario: Scenario, plain: Choice, on_choice: Callable[[Choice], None]
) -> list[Choice]:
    """The choice, and the same with more and more redundancy, as long as more is quicker."""
    found = [plain]
    for share in _REDUNDANT:
        before = _least_waste(found)
        groups = math.ceil(share * scenario.batch_size / scenario.group_size)
        episodes = math.ceil(share * scenario.group_size)
        for pair in ((groups, 0), (0, episodes), (groups, episodes)):
            if any(pair == (c.redundant_groups, c.redundant_episodes) for c in found):
                continue
            found.append(_choice(scenario, plain.alpha, plain.workers, plain.trainer_gpus, *pair))
            on_choice(found[-1])
        if _least_waste(found) is before:
            break
    return found


def _least_waste(choices: Sequence[Choice]) -> Choice:
    return min(_nearly_quickest(choices), key=lambda choice: choice.result.wasted_share)


def _nearly_quickest(choices: Sequence[Choice]) -> list[Choice]:
    quickest = max(choice.result.samples_per_s for choice in choices)
    return [choice for choice in choices if choice.result.samples_per_s >= _NEARLY * quickest]


def _choice(
    scenario: Scenario,
    alpha: float,
    workers: int,
    trainer_gpus: int,
    redundant_groups: int = 0,
    redundant_episodes: int = 0,
) -> Choice:
    # Long enough for the start to matter little, and no longer.
    steps = 4 + round(3 * (1 + alpha))
    split = {"workers.count": workers, "trainer.gpus": trainer_gpus}
    redundant = {
        "rollout.redundant_groups": redundant_groups,
        "rollout.redundant_episodes": redundant_episodes,
    }
    changes = {"alpha": alpha, **split, **redundant}
    return Choice(
        alpha=alpha,
        workers=workers,
        trainer_gpus=trainer_gpus,
        redundant_groups=redundant_groups,
        redundant_episodes=redundant_episodes,
        result=simulate(scenario.changed({**changes, "time_s": None, "steps": steps})),
    )
