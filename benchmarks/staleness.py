"""What staleness does to learning, with each objective: forced, natural, and under an adaptive α.

A small policy that a teacher of many mistakes taught to sort learns to do better, once for each
objective, α and seed; `study/cell.py` says what a cell is. Each cell's result is kept, and a study
that was stopped goes on with the cells that are missing.

    python benchmarks/staleness.py                            # a part of it
    python benchmarks/staleness.py --arms all --alphas 0,1,2,4,8 --jobs 8
    python benchmarks/staleness.py --report                   # of the cells that are there
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from study.cell import MODES, Cell, Job, Mode, run_cell
from study.results import draw, summarise, table
from study.sorting import SortingEnv

from flash.agents import PlainStyle
from flash.system.quiet import no_progress_bars
from flash.warm_start.config import PolicyConfig, WarmStartConfig
from flash.warm_start.teach import key_of, small_model

RESULTS = Path(__file__).parent / "results" / "staleness"
OBJECTIVES = (
    "vanilla", "opmd", "ppo", "decoupled_ppo", "tis", "cispo", "topr", "gspo", "icepop",
    "masked_is", "kimi15",
)  # fmt: skip


def grid(
    modes: Sequence[Mode], arms: Sequence[str], alphas: Sequence[int], seeds: int
) -> Iterator[Cell]:
    """The cells, seed by seed, so that a study that is cut short has some of each kind."""
    for seed, mode, alpha, arm in itertools.product(range(seeds), modes, alphas, arms):
        yield Cell(mode=mode, arm=arm, alpha=alpha, seed=seed)


def missing(cells: Iterable[Cell], job: Job, folder: Path) -> list[Cell]:
    """Those without a result for this very job."""
    return [cell for cell in cells if _job_of(folder / f"{cell.name}.json") != asdict(job)]


def _job_of(path: Path) -> object:
    return json.loads(path.read_text())["job"] if path.exists() else None


def run_and_keep(cell: Cell, *, job: Job, model: Path, folder: Path) -> str:
    """Runs the cell and writes its file, whole or not at all."""
    with no_progress_bars():
        result = run_cell(cell, job, model)
    path = folder / f"{cell.name}.json"
    partial_path = path.with_suffix(f".{os.getpid()}")
    partial_path.write_text(json.dumps(result))
    partial_path.rename(path)
    return f"{cell.name}: {result['final']:.3f}"


async def prepared_model(folder: Path) -> Path:
    """The policy that all cells start from; made once."""
    return await small_model(
        envs=[SortingEnv()],
        env_key=key_of([{"name": "sorting"}]),
        make_style=PlainStyle,
        policy=PolicyConfig(layers=2, hidden_size=64, heads=2, max_tokens=64),
        warm_start=WarmStartConfig(
            steps=300, demonstrations=4000, batch_tokens=2048, observation_weight=0.0
        ),
        threads=1,
        seed=0,
        cache_dir=folder / "start",
        on_progress=lambda *_: None,
    )


def run(cells: list[Cell], *, job: Job, folder: Path, jobs: int) -> None:
    """Runs what is missing, `jobs` cells side by side, a core each."""
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    todo = missing(cells, job, folder / "cells")
    print(f"{len(cells) - len(todo)} of {len(cells)} cells are there already", flush=True)
    if not todo:
        return
    model = asyncio.run(prepared_model(folder))
    work = partial(run_and_keep, job=job, model=model, folder=folder / "cells")
    processes = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=processes, initializer=_one_thread) as pool:
        for number, line in enumerate(pool.map(work, todo), 1):
            print(f"{number}/{len(todo)} {line}", flush=True)


def _one_thread() -> None:
    torch.set_num_threads(1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--modes", default="forced", help=f"of {', '.join(MODES)}")
    parser.add_argument(
        "--arms", default="vanilla,decoupled_ppo,tis,topr", help="objectives; all: every one"
    )
    parser.add_argument("--alphas", default="0,2,8")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--steps", type=int, default=Job.steps)
    parser.add_argument("--train_s", type=float, default=Job.train_s, help="a step, virtual time")
    parser.add_argument("--uses", type=int, default=Job.uses, help="rollout.reuse.uses")
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side, a core each")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go")
    parser.add_argument("--picture", type=Path, default=RESULTS / "staleness.png")
    options = parser.parse_args(arguments)
    asked = options.modes.split(",")
    if unknown := set(asked) - set(MODES):
        parser.error(f"--modes: {', '.join(sorted(unknown))}: give some of {', '.join(MODES)}")
    if not options.report:
        modes = [mode for mode in MODES if mode in asked]
        arms = OBJECTIVES if options.arms == "all" else options.arms.split(",")
        alphas = [int(alpha) for alpha in options.alphas.split(",")]
        cells = list(grid(modes, arms, alphas, options.seeds))
        job = Job(steps=options.steps, train_s=options.train_s, uses=options.uses)
        run(cells, job=job, folder=options.folder, jobs=options.jobs)
    summary = summarise(options.folder / "cells")
    print(table(summary))
    (options.folder / "summary.json").write_text(json.dumps(summary) + "\n")
    draw(summary, options.picture)
    print(f"written to {options.folder / 'summary.json'} and {options.picture}")


if __name__ == "__main__":
    main()
