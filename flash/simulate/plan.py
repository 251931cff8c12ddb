"""`flash plan`: how to split the GPUs, how much asynchrony to allow, how much to begin in vain.

For each α the split is searched that trains the most samples a second: with too few workers the
trainer waits, with too many they wait. Between the two the curve has one top, so each round of the
search keeps the side where it is higher. Then redundancy is tried at each α's best split: what it
brings depends on the tail, and costs tokens that nobody trains.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
    """Calls `on_choice` with each choice as it is simulated.

    ValueError if the GPUs don't suffice for one worker and a trainer.
    """
    splits = _splits(gpus, scenario.workers.gpus)
    for alpha in alphas:  # all are checked before the first one takes its time
        scenario.changed({"alpha": alpha})
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
    redundant = {"redundant_groups": redundant_groups, "redundant_episodes": redundant_episodes}
    changes = {"alpha": alpha, **split, **redundant}
    result = simulate(scenario.changed({**changes, "time_s": None, "steps": steps}))
    return Choice(
        alpha=alpha, workers=workers, trainer_gpus=trainer_gpus, result=result, **redundant
    )


def run(scenario: Scenario, *, gpus: int, alphas: Sequence[float], folder: Path) -> Plan:
    """Prints the plan as it is found; keeps it there, with a picture and the best scenario."""
    header = (
        f"{'alpha':>5} {'workers':>8} {'trainer':>8} {'+groups':>7} {'+episodes':>9} "
        f"{'samples/s':>9} {'idle: trainer':>13} {'workers':>7} "
        f"{'age: mean':>9} {'max':>3} {'wasted':>6}"
    )
    print(f"{scenario.name}: {gpus} GPUs, workers of {scenario.workers.gpus}\n{header}")
    found = plan(
        scenario,
        gpus=gpus,
        alphas=alphas,
        on_choice=lambda choice: print(_line(choice, scenario), flush=True),
    )
    print("\nbest of each alpha:\n" + header)
    for choice in found.best:
        print(f"{_line(choice, scenario)}  {choice.why}")
    take = found.recommended
    if scenario.steps:
        total_s = scenario.steps * scenario.batch_size / take.result.samples_per_s
        minutes = total_s / 60
        took = f"; {scenario.steps} steps would take "
        took += f"{minutes / 60:.1f} h" if minutes > 60 else f"{minutes:.1f} min"
    else:
        took = ""
    print(
        f"\ntake alpha={take.alpha:g} with {take.workers} workers and {take.trainer_gpus} GPUs for "
        f"the trainer{_spare(take)}: {take.result.samples_per_s:.3g} samples/s{took}"
    )
    print("written:", ", ".join(map(str, _write(found, folder))))
    return found


def _spare(choice: Choice) -> str:
    if not choice.redundant_groups and not choice.redundant_episodes:
        return ""
    return (
        f", redundant_groups={choice.redundant_groups} and "
        f"redundant_episodes={choice.redundant_episodes}"
    )


def _line(choice: Choice, scenario: Scenario) -> str:
    result = choice.result
    return (
        f"{choice.alpha:5g} {choice.workers:4}×{scenario.workers.gpus:<3} "
        f"{choice.trainer_gpus:8} {choice.redundant_groups:7} {choice.redundant_episodes:9} "
        f"{result.samples_per_s:9.3g} {result.idle_trainer:13.0%} "
        f"{result.idle_workers:7.0%} {result.staleness_mean:9.2f} {result.staleness_max:3} "
        f"{result.wasted_share:6.1%}"
    )


def _write(found: Plan, folder: Path) -> list[Path]:
    from flash.simulate.picture import draw_plan  # noqa: PLC0415  (slow to import)

    paths = [folder / name for name in ("plan.json", "best.yaml", "frontier.png")]
    paths[0].write_text(json.dumps([_summary(c) for c in found.tried], indent=1) + "\n")
    best = found.recommended.result.scenario
    settings = best.changed({"name": f"{best.name}_planned"}).model_dump(
        mode="json", exclude_unset=True
    )
    paths[1].write_text(yaml.safe_dump(settings, sort_keys=False))
    draw_plan(found).savefig(paths[2], dpi=110)
    return paths


def _summary(choice: Choice) -> Mapping[str, Any]:
    result = choice.result
    return {
        "alpha": choice.alpha,
        "workers": choice.workers,
        "trainer_gpus": choice.trainer_gpus,
        "redundant_groups": choice.redundant_groups,
        "redundant_episodes": choice.redundant_episodes,
        "samples_per_s": result.samples_per_s,
        "idle_trainer": result.idle_trainer,
        "idle_workers": result.idle_workers,
        "staleness_mean": result.staleness_mean,
        "staleness_max": result.staleness_max,
        "wasted_share": result.wasted_share,
    }
