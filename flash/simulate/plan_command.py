"""What `flash plan` does: searches a plan, prints what it tries, keeps the scenario to take."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flash.simulate.command import check_memory, make_folder
from flash.simulate.plan import Choice, Plan, check, plan
from flash.simulate.scenario import Scenario

_FOLDER = Path("runs/plans")


def run(scenario: Scenario, *, gpus: int, alphas: Sequence[float], out: Path | None = None) -> Plan:
    """Prints the plan as it is found; keeps it, with a picture and the best scenario."""
    check(scenario, gpus=gpus, alphas=alphas)
    check_memory(scenario, gpus // scenario.workers.gpus, f"--gpus {gpus}")
    folder = make_folder(out or _FOLDER / scenario.name)
    header = (
        f"{'alpha':>5} {'workers':>8} {'trainer':>8} {'+groups':>7} {'+episodes':>9} "
        f"{'samples/s':>9} {'in all':>8} {'idle: trainer':>13} {'workers':>7} "
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
    print(
        f"\ntake alpha={take.alpha:g} with {take.workers} workers and {take.trainer_gpus} GPUs for "
        f"the trainer{_spare(take)}: {take.result.samples_per_s:.3g} samples/s; "
        f"{_outlook(take, scenario, gpus)}"
    )
    print("written:", ", ".join(map(str, _write(found, folder))))
    return found


def _total_s(choice: Choice, scenario: Scenario) -> float | None:
    """How long the whole run would take; None for one that ends by its time."""
    if scenario.steps is None:
        return None
    return scenario.steps * scenario.batch_size / choice.result.samples_per_s


def _outlook(choice: Choice, scenario: Scenario, gpus: int) -> str:
    """What the run would take in all, or how far it would get in its time."""
    if (total_s := _total_s(choice, scenario)) is not None:
        return (
            f"{scenario.steps} steps would take {_duration(total_s)} in all, "
            f"{total_s / 3600 * gpus:.3g} GPU hours"
        )
    assert scenario.time_s is not None, "one of the two ends it"
    steps = scenario.time_s * choice.result.samples_per_s / scenario.batch_size
    return f"{_duration(scenario.time_s)} would do for {steps:.0f} steps"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _spare(choice: Choice) -> str:
    if not choice.redundant_groups and not choice.redundant_episodes:
        return ""
    return (
        f", rollout.redundant_groups={choice.redundant_groups} and "
        f"rollout.redundant_episodes={choice.redundant_episodes}"
    )


def _line(choice: Choice, scenario: Scenario) -> str:
    result = choice.result
    total_s = _total_s(choice, scenario)
    in_all = "" if total_s is None else _duration(total_s)
    return (
        f"{choice.alpha:5g} {choice.workers:4}×{scenario.workers.gpus:<3} "
        f"{choice.trainer_gpus:8} {choice.redundant_groups:7} {choice.redundant_episodes:9} "
        f"{result.samples_per_s:9.3g} {in_all:>8} {result.idle_trainer:13.0%} "
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
