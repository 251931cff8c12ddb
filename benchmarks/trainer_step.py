"""What a rank's start and a step cost on a CPU, for the small policy and for one twice as wide.

    python benchmarks/trainer_step.py [--steps 20] [--ranks 1]

Prints a table and writes runs/benchmarks/trainer_step.json.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from flash.small_policy import create
from flash.trainer import Trainer, TrainerConfig
from flash.trainer.objectives.settings import DecoupledPpo, Supervised
from flash.types import Batch, Sample

# (what it is called, hidden size, layers)
POLICIES = (("3 x 128", 128, 3), ("4 x 256", 256, 4))


def episodes(seed: int = 0, *, supervised: bool = False) -> list[Sample]:
    """24 episodes of 150 to 280 tokens; a quarter of them sampled, in runs of four."""
    rng = np.random.default_rng(seed)
    samples = []
    for episode in range(24):
        length = int(rng.integers(150, 281))
        mask = (np.arange(length) % 16 >= 12).astype(np.float32)
        samples.append(
            Sample(
                token_ids=rng.integers(4, 900, length),
                loss_mask=np.where(mask > 0, 1.0, 0.5).astype(np.float32) if supervised else mask,
                logprobs=(-6.5 * mask).astype(np.float32),
                versions=np.where(mask > 0, 0, -1),
                advantage=float(rng.normal()),
                episode=episode,
            )
        )
    return samples


async def measure(model: Path, steps: int, ranks: int, supervised: bool) -> dict[str, float]:
    config = TrainerConfig(
        ranks=ranks,
        objective=Supervised() if supervised else DecoupledPpo(),
        learning_rate=1e-4,
        threads=1,
    )
    samples = episodes(supervised=supervised)
    with tempfile.TemporaryDirectory() as run_dir:
        started = time.perf_counter()
        async with Trainer(model=model, config=config, run_dir=Path(run_dir)) as trainer:
            start_s = time.perf_counter() - started
            times = []
            for _ in range(steps):
                started = time.perf_counter()
                await trainer.step(Batch(samples=samples, version=trainer.version))
                times.append(time.perf_counter() - started)
    return {
        "start_s": start_s,
        "first_step_s": times[0],
        "step_median_s": statistics.median(times[1:]),
        "step_best_s": min(times),
        "tokens": sum(sample.num_tokens for sample in samples),
    }


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=1)
    options = parser.parse_args()
    results = {}
    print(f"{'policy':10} {'objective':12} {'start':>7} {'first':>7} {'median':>7} {'best':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for name, hidden_size, layers in POLICIES:
            model = create(
                Path(folder) / name.replace(" ", ""),
                [f"word{number}" for number in range(996)],
                layers=layers,
                hidden_size=hidden_size,
            )
            for supervised in (False, True):
                objective = "supervised" if supervised else "ppo"
                figures = await measure(model, options.steps, options.ranks, supervised)
                results[f"{name} {objective}"] = figures
                print(
                    f"{name:10} {objective:12} {figures['start_s']:6.1f}s "
                    f"{figures['first_step_s']:6.3f}s {figures['step_median_s']:6.3f}s "
                    f"{figures['step_best_s']:6.3f}s"
                )
    output = Path("runs/benchmarks/trainer_step.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    asyncio.run(main())
