"""What `flash plan` does: searches a plan, prints what it tries, keeps the scenario to take."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flash.simulate.command import make_folder
from flash.simulate.plan import Choice, Plan, check, plan
from flash.simulate.scenario import Scenario

_FOLDER = Path("runs/plans")


def run(scenario: Scenario, *, gpus: int, alphas: Sequence[float], out: Path | None = None) -> Plan:
    """Prints the plan as it is found; keeps it, with a picture and the best scenario."""
    check(scenario, gpus=gpus, alphas=alphas)
    folder = make_folder(out or _FOLDER / scenario.name)
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
        f", rollout.redundant_groups={choice.redundant_groups} and "
        f"rollout.redundant_episodes={choice.redundant_episodes}"
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
