"""What `flash simulate` does: simulates the scenarios of a sweep, prints a table, keeps files."""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flash.simulate.calibrate import calibrate
from flash.simulate.results import Row
from flash.simulate.run import simulate
from flash.simulate.scenario import Scenario
from flash.system import machine

_FOLDER = Path("runs/simulations")
_WORKER_BYTES = 4e3  # measured, like that of an episode
_EPISODE_BYTES = 10e3
_COLUMNS = {
    "samples_per_s": ("samples/s", "{:9.3g}"),
    "tokens_per_s": ("tokens/s", "{:9.3g}"),
    "idle_trainer": ("idle: trainer", "{:13.0%}"),
    "idle_workers": ("workers", "{:7.0%}"),
    "staleness_mean": ("age: mean", "{:9.2f}"),
    "staleness_max": ("max", "{:3.0f}"),
    "wasted_share": ("wasted", "{:6.1%}"),
    "took_s": ("took s", "{:6.1f}"),
}


def sweep(
    scenario: Scenario,
    values: Mapping[str, Sequence[Any]],
    *,
    seeds: int = 1,
    timeline: bool = False,
    out: Path | None = None,
) -> list[Row]:
    """Prints a row for each combination as it is simulated, then writes JSON and a picture."""
    combinations = [
        dict(zip(values, combination, strict=True))
        for combination in itertools.product(*values.values())
    ]
    # All are checked before the first one takes its time.
    scenarios = [scenario.changed(changes) for changes in combinations]
    for changed in scenarios:
        workers = changed.workers.count
        check_memory(changed, workers, f"workers.count={workers}")
    folder = make_folder(out or _FOLDER / scenario.name)
    trace = folder / "timeline.json.gz" if timeline else None
    _print_title(scenario)
    widths = [max(len(name), *(len(_text(c[name])) for c in combinations)) for name in values]
    print(*_header(values, widths))
    rows: list[Row] = []
    for changes, changed in zip(combinations, scenarios, strict=True):
        results = []
        for seed in range(changed.seed, changed.seed + seeds):
            results.append(simulate(changed.changed({"seed": seed}), timeline=trace))
            trace = None
        rows.append(Row(changes=changes, results=results))
        print(*_cells(rows[-1], rows[0], widths), flush=True)
        if not all(result.steps for result in results):
            print(
                f"  time_s={changed.time_s:g} ended before the first batch was trained: give more"
            )
    written = [_write_json(folder, rows), _write_picture(folder, rows)]
    written += [folder / "timeline.json.gz"] if timeline else []
    print("written:", ", ".join(map(str, written)))
    return rows


def calibrated(run: Path, out: Path | None = None) -> Scenario:
    """The scenario fitted to a run; prints how well it fits, and keeps it as `scenario.yaml`."""
    calibration = calibrate(run)
    scenario = calibration.scenario
    path = make_folder(out or _FOLDER / scenario.name) / "scenario.yaml"
    settings = scenario.model_dump(mode="json", exclude_unset=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    print(
        f"{run}: {scenario.steps} steps in {calibration.measured_s:.1f} s, simulated "
        f"{calibration.simulated_s:.1f} s ({calibration.error:+.1%}); fitted: {path}"
    )
    return scenario


def make_folder(folder: Path) -> Path:
    """The folder, which is there from now on. ValueError if it can't be, by the option's name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {folder}: {error.strerror}; name a folder") from error
    return folder


def check_memory(scenario: Scenario, workers: int, field: str) -> None:
    """ValueError if this machine can't hold what is simulated; `field` gives the workers."""
    has = machine.capacity()
    rollout = scenario.rollout
    groups = scenario.batch_size // scenario.group_size + rollout.redundant_groups
    episodes = groups * (scenario.group_size + rollout.redundant_episodes)
    episodes += int(scenario.alpha * scenario.batch_size)
    if rollout.reuse.is_on:
        episodes += int((1 + scenario.alpha) * scenario.batch_size)
    for fields, wanted in (
        (field, workers * _WORKER_BYTES),
        (f"batch_size={scenario.batch_size} with alpha={scenario.alpha:g} and rollout's "
         f"redundancy", episodes * _EPISODE_BYTES),
    ):  # fmt: skip
        if wanted > has.memory_bytes:
            raise ValueError(
                f"{fields}: simulating it needs {wanted / 1e9:,.1f} GB of memory, more than {has} "
                f"can give: take less"
            )


def _print_title(scenario: Scenario) -> None:
    workers = scenario.workers
    print(
        f"{scenario.name}: {scenario.gpus} GPUs ({workers.count} workers of {workers.gpus}, "
        f"trainer of {scenario.trainer.gpus}), batches of {scenario.batch_size} in groups of "
        f"{scenario.group_size}, alpha={scenario.alpha:g}"
    )


def _header(names: Sequence[str] | Mapping[str, Any], widths: Sequence[int]) -> Iterator[str]:
    for name, width in zip(names, widths, strict=True):
        yield f"{name:>{width}}"
    yield "speed-up"
    for title, form in _COLUMNS.values():
        yield f"{title:>{len(form.format(0.0))}}"


def _cells(row: Row, first: Row, widths: Sequence[int]) -> Iterator[str]:
    for value, width in zip(row.changes.values(), widths, strict=True):
        yield f"{_text(value):>{width}}"
    base = first.mean("samples_per_s")
    speed_up = row.mean("samples_per_s") / base if base else math.nan
    yield f"{speed_up:7.2f}x"
    for name, (_, form) in _COLUMNS.items():
        yield form.format(row.mean(name))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _write_json(folder: Path, rows: Sequence[Row]) -> Path:
    path = folder / "results.json"
    runs = [
        {"changes": dict(row.changes), **result.summary()} for row in rows for result in row.results
    ]
    path.write_text(json.dumps(_finite(runs), indent=1) + "\n")
    return path


def _write_picture(folder: Path, rows: Sequence[Row]) -> Path:
    from flash.simulate.picture import draw_run, draw_sweep  # noqa: PLC0415  (slow to import)

    path = folder / "picture.png"
    figure = draw_sweep(rows) if len(rows) > 1 else draw_run(rows[0].results[0])
    figure.savefig(path, dpi=110)
    return path


def _finite(value: Any) -> Any:
    """JSON has no nan and no infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
