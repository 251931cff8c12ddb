"""Synchronous against asynchronous training of the same job, with slow, long-tailed environments.

The real hub, worker, agents, loop and trainer play FrozenLake; each environment step also sleeps a
seeded lognormal time, the same in every run, so that cores are no limit. Every run trains the same
number of samples, and keeps its folder, which `flash simulate --calibrate` reads. With --stream
each is run twice, the second time with gradients computed as groups finish. With --ablation all
features are on, and then each is off in turn.

    python benchmarks/sync_vs_async.py [--steps 10] [--alphas 0,1,2] [--mean-s 0.25] [--sigma 1.2]
                                       [--stream] [--ablation] [--hidden-size 64]
"""

import argparse
import asyncio
import itertools
import json
import math
import random
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from flash import InferenceHub, InlineEnvs, RolloutLoop, Task
from flash.agents import EnvironmentAgent, PlainStyle
from flash.config import Config, parse
from flash.envs.frozen_lake import FrozenLakeTextEnv
from flash.hub.embedded_pool import EmbeddedPool
from flash.telemetry.folder import RunFolder
from flash.trainer.config import TrainerConfig
from flash.trainer.trainer import Trainer
from flash.types import AsyncEnv, EnvSource, Observation
from flash.warm_start.small_policy import create

RESULTS = Path(__file__).parent / "results" / "sync_vs_async.json"

# benchmarks/ablation.py has the simulated one, on a cluster.
_REDUNDANT = {"redundant_groups": 1, "redundant_episodes": 1}
ABLATION: dict[str, dict[str, Any]] = {
    "all features": {"alpha": 2, "rollout": _REDUNDANT},
    "no asynchrony": {"alpha": 0, "rollout": _REDUNDANT},
    "one step off": {"alpha": 1, "rollout": _REDUNDANT},
    "no redundancy": {"alpha": 2},
    "batches, not a queue": {"alpha": 2, "rollout": {**_REDUNDANT, "schedule": "batch"}},
    "stale groups dropped": {"alpha": 2, "rollout": {**_REDUNDANT, "on_stale": "drop"}},
    "none of them": {"alpha": 0, "rollout": {"schedule": "batch"}},
}


class SlowEnvs:
    """Environments whose steps take a lognormal time, decided by task, how often it was played
    before, and turn: so that all runs wait for the same."""

    def __init__(self, envs: EnvSource, *, mean_s: float, sigma: float) -> None:
        self._envs = envs
        self._mu = math.log(mean_s) - sigma**2 / 2
        self._sigma = sigma
        self._episodes: Counter[int] = Counter()

    async def open(self) -> AsyncEnv:
        return _SlowEnv(await self._envs.open(), self)

    def begin(self, task: Task) -> random.Random:
        """What decides the times of the task's next episode."""
        self._episodes[task.seed] += 1
        return random.Random(f"{task.seed} {self._episodes[task.seed]}")

    async def take_time(self, rng: random.Random) -> None:
        await asyncio.sleep(rng.lognormvariate(self._mu, self._sigma))


class _SlowEnv:
    def __init__(self, env: AsyncEnv, slow: SlowEnvs) -> None:
        self.deterministic = env.deterministic
        self._env, self._slow = env, slow

    async def reset(self, task: Task) -> Observation:
        self._rng = self._slow.begin(task)
        return await self._env.reset(task)

    async def step(self, action: str) -> Observation:
        await self._slow.take_time(self._rng)
        return await self._env.step(action)

    def close(self) -> None:
        self._env.close()


def variants(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The runs, and how each differs from the others."""
    if options.ablation:
        return ABLATION
    streams = [False, True] if options.stream else [False]
    return {
        f"alpha{alpha:g}{'_stream' * stream}": {"alpha": alpha, "stream": stream}
        for alpha, stream in itertools.product(map(float, options.alphas.split(",")), streams)
    }


def configured(name: str, changes: dict[str, Any], options: argparse.Namespace) -> Config:
    """What the run would be told if it were one of `flash train`."""
    return parse(
        {
            "name": "sync_vs_async_" + re.sub(r"\W+", "_", name),
            "runs_dir": options.runs_dir,
            "env": "frozen_lake",
            **changes,
            "steps": options.steps,
            "batch_size": options.batch_size,
            "group_size": options.group_size,
            "engine": {"max_running": 12, "cache_tokens": 32_768},
            "agent": {"max_tokens": 3},
        }
    )


async def one_run(
    config: Config, options: argparse.Namespace, run: RunFolder, folder: Path
) -> dict[str, float]:
    """Train `config.steps` batches; what it took."""
    vocabulary, hidden_size = FrozenLakeTextEnv().vocabulary(), options.hidden_size
    model = create(folder / "model", vocabulary, layers=2, hidden_size=hidden_size)
    style = PlainStyle(AutoTokenizer.from_pretrained(model))
    envs = SlowEnvs(
        InlineEnvs(lambda: FrozenLakeTextEnv(max_turns=8)),
        mean_s=options.mean_s,
        sigma=options.sigma,
    )
    pool = EmbeddedPool(
        str(model), size=1, max_running=12, cache_tokens=32_768, threads=1, dtype="float32",
        version=0, seed=0, log_dir=folder / "logs", start_timeout_s=120,
    )  # fmt: skip
    clock = asyncio.get_running_loop().time
    train_s = 0.0
    async with (
        Trainer(
            model=model,
            config=TrainerConfig(threads=1, learning_rate=1e-4),
            run_dir=folder,
        ) as trainer,
        InferenceHub(pool, max_running=12) as hub,
        RolloutLoop(
            hub,
            agent=lambda: EnvironmentAgent(envs=envs, style=style, max_tokens=3),
            tasks=(Task(seed) for seed in itertools.count()),
            batch_size=config.batch_size,
            group_size=config.group_size,
            alpha=config.alpha,
            settings=config.rollout,
            observers=[run],
        ) as rollouts,
    ):
        started = clock()
        for step in range(1, config.steps + 1):
            wait_s, of_step_s, last = 0.0, 0.0, False
            while not last:
                began = clock()
                batch = await (rollouts.next_part() if config.stream else rollouts.next_batch())
                last = batch.last
                took = clock()
                await (trainer.step(batch) if last else trainer.add(batch))
                trained = clock()
                wait_s += took - began
                of_step_s += trained - took
            await rollouts.publish(await trainer.export_weights())
            train_s += of_step_s
            stats = hub.stats()
            run.measured(
                {
                    "step": step,
                    "time_s": clock() - started,
                    "time/wait_batch_s": wait_s,
                    "time/train_s": of_step_s,
                    "time/publish_s": clock() - trained,
                    "tokens/generated": stats.generated_tokens,
                    "publish/count": stats.publishes,
                    "publish/paused_s": stats.paused_s,
                }
            )
        wall_s = clock() - started
        busy_s = sum(worker.busy_s for worker in hub.stats().workers)
        ledger = rollouts.ledger
        return {
            "alpha": config.alpha,
            "samples": ledger.count("trained"),
            "wall_s": wall_s,
            "idle_trainer": 1 - train_s / wall_s,
            "idle_worker": 1 - min(1.0, busy_s / wall_s),
            "wasted_tokens": ledger.waste_tokens,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--alphas", default="0,1,2")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--mean-s", type=float, default=0.25, help="mean latency of a step")
    parser.add_argument("--sigma", type=float, default=1.2, help="of its logarithm")
    parser.add_argument("--stream", action="store_true", help="each run with stream=true as well")
    parser.add_argument("--ablation", action="store_true", help="each feature off in turn")
    parser.add_argument("--hidden-size", type=int, default=64, help="of the policy")
    parser.add_argument("--runs-dir", default="runs", help="where the runs' folders go")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the numbers go")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'run':20} {'samples':>7} {'wall s':>7} {'idle trainer':>12} "
          f"{'idle worker':>11} {'wasted tokens':>13} {'speed-up':>8}")  # fmt: skip
    for name, changes in variants(options).items():
        with (
            tempfile.TemporaryDirectory() as folder,
            RunFolder(configured(name, changes, options)) as run,
        ):
            took = asyncio.run(one_run(run.config, options, run, Path(folder)))
        row: dict[str, Any] = {"run": name, **took}
        rows.append(row)
        row["speed_up"] = rows[0]["wall_s"] / row["wall_s"]
        print(
            f"{name:20} {row['samples']:7.0f} {row['wall_s']:7.1f} "
            f"{row['idle_trainer']:12.0%} {row['idle_worker']:11.0%} "
            f"{row['wasted_tokens']:13.0f} {row['speed_up']:7.2f}x"
        )
    options.results.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(options).items()}
    options.results.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2) + "\n")
    print(f"written to {options.results}")


if __name__ == "__main__":
    main()
