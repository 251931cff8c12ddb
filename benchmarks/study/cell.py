"""One cell of the study: a run that learns to sort, with one objective, one α and one seed.

The hub, the rollout loop, the agents, the environment, the advantages and the trainer's rank are
the engine's own; the policy is real and learns. Only time is virtual: a token, a step of the
environment and a training step take what `Job` says, and a cell is the same each time.

forced    synchronous, with weights that are published `alpha` versions late: every token is exactly
          so old (in the first steps, as old as the trainer is)
natural   asynchronous: samples are as old as the run makes them, at most `alpha` versions
adaptive  the same with an adaptive α, of which `alpha` is the bound
"""

import asyncio
import itertools
import math
import random
import shutil
import tempfile
from collections import deque
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch.distributed as dist
from transformers import AutoTokenizer

from flash import InferenceHub, InlineEnvs, RolloutLoop, Task, virtual_time
from flash.agents import EnvironmentAgent, PlainStyle
from flash.evaluation.play import play
from flash.rollout.adaptive import AdaptiveAlpha
from flash.rollout.config import ReuseConfig, RolloutSettings
from flash.trainer.advantages import Advantages, make_advantages
from flash.trainer.config import TrainerConfig
from flash.trainer.packing import divide
from flash.trainer.rank import Rank
from flash.types import AsyncEnv, Batch, EnvSource, Observation, Weights
from study.policy_worker import PolicyWorker
from study.sorting import SortingEnv

Mode = Literal["forced", "natural", "adaptive"]
MODES: tuple[Mode, ...] = get_args(Mode)

_KEPT = ("importance/ess", "weight/ess", "weight/p01", "weight/p50", "weight/p99", "kl_behaviour",
         "mismatch/kl_fresh", "mismatch/kl_stale", "ratio/clip_fraction", "grad_norm")  # fmt: skip
_MAX_TOKENS = 6
_MIN_ESS = 0.95  # of the adaptive α
_FOREVER_S = 1e9
_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What all cells have in common. Times are the virtual clock's."""

    steps: int = 48
    batch_size: int = 64
    group_size: int = 8
    mini_batches: int = 2
    learning_rate: float = 3e-4
    eval_tasks: int = 400
    token_s: float = 0.05
    train_s: float = 1.5
    env_s: float = 1.0
    env_sigma: float = 1.2
    uses: int = 1  # rollout.reuse.uses


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run. `arm` is an objective by name or a variant of the study's (see ARMS)."""

    mode: Mode
    arm: str
    alpha: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.mode}-{self.arm}-{self.alpha}-{self.seed}"


# What an arm is where it is more than an objective's name.
ARMS: dict[str, dict[str, Any]] = {
    "vanilla": {"name": "vanilla", "allow_stale": True},
    "opmd": {"name": "opmd", "allow_stale": True},
    "gspo": {"name": "gspo", "clip_low": 0.2, "clip_high": 0.28},
    "asymmetric": {"name": "vanilla", "allow_stale": True},
}
# Arnal et al. 2025: the baseline is the group's mean less this.
_LOWER_BASELINE = 0.1


def run_cell(cell: Cell, job: Job, model: Path) -> dict[str, Any]:
    """What came out, ready for JSON."""
    return virtual_time.run(_run(cell, job, model))


async def _run(cell: Cell, job: Job, model: Path) -> dict[str, Any]:
    config = TrainerConfig(
        objective=ARMS.get(cell.arm, {"name": cell.arm}),
        learning_rate=job.learning_rate,
        mini_batches=job.mini_batches,
        warmup_steps=4,
        threads=1,
    )
    lag = cell.alpha if cell.mode == "forced" else 0
    style = PlainStyle(AutoTokenizer.from_pretrained(model))
    envs = InlineEnvs(SortingEnv)
    heldout = InlineEnvs(lambda: SortingEnv(heldout=True))
    slow = _SlowEnvs(envs, job, cell.seed) if cell.mode != "forced" else envs
    min_ess = _MIN_ESS if cell.mode == "adaptive" else None
    adaptive = AdaptiveAlpha(cell.alpha - lag, min_ess=min_ess)
    clock = asyncio.get_running_loop().time
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory(dir=_MEMORY) as folder,
        _LocalTrainer(model, config, Path(folder), cell.seed) as trainer,
    ):
        worker = PolicyWorker(model, seed=cell.seed, token_s=job.token_s)
        late = deque([trainer.export()] * lag)  # published so many versions late
        async with (
            InferenceHub([worker], max_running=1024) as hub,
            RolloutLoop(
                hub,
                agent=_agents(slow, style),
                tasks=(Task((cell.seed << 24) + i) for i in itertools.count()),
                batch_size=job.batch_size,
                group_size=job.group_size,
                alpha=cell.alpha - lag,
                advantages=_advantages(cell, config),
                settings=RolloutSettings(
                    stall_timeout_s=_FOREVER_S,
                    reuse=ReuseConfig(uses=job.uses if cell.mode != "forced" else 1),
                ),
            ) as rollouts,
        ):
            for step in range(job.steps):
                began = clock()
                batch = aged(await rollouts.next_batch(), min(step, lag))
                waited = clock() - began
                await asyncio.sleep(job.train_s)
                metrics = trainer.step(batch)
                late.append(trainer.export())
                await rollouts.publish(Weights(version=step + 1, path=late.popleft()))
                metrics["idle/trainer"] = waited / (clock() - began)
                rows.append(_row(step, clock(), batch, metrics, rollouts))
                rollouts.use_alpha(adaptive.after_step(metrics))
                for unused in trainer.exports[: -lag - 2]:
                    shutil.rmtree(unused, ignore_errors=True)
            # The newest weights, however late they were published.
            await hub.publish(Weights(version=job.steps + 1, path=trainer.exports[-1]))
            with rollouts.paused():
                exam = await play(
                    hub,
                    _agents(heldout, style),
                    [Task(seed) for seed in range(job.eval_tasks)],
                    concurrency=rollouts.capacity,
                    stall_timeout_s=_FOREVER_S,
                )
            waste = rollouts.ledger.waste_tokens
    return {
        "cell": asdict(cell),
        "job": asdict(job),
        "final": exam.success_rate,
        "wasted_tokens": waste,
        "steps": rows,
    }


def aged(batch: Batch, versions: int) -> Batch:
    """The batch with its true versions, where weights were published under later ones."""
    samples = [
        replace(s, versions=np.where(s.loss_mask > 0, s.versions - versions, s.versions))
        for s in batch.samples
    ]
    return replace(batch, samples=samples)


def _row(
    step: int, now: float, batch: Batch, metrics: dict[str, float], rollouts: RolloutLoop
) -> dict[str, Any]:
    ages = batch.version - np.concatenate([s.sampled_versions() for s in batch.samples])
    return {
        "step": step,
        "time_s": now,
        "samples": rollouts.ledger.count("trained"),
        "reward": batch.metrics["reward/mean"],
        "age/mean": float(ages.mean()),
        "age/max": int(ages.max()),
        "alpha": rollouts.alpha_in_force,
        **{name: metrics[name] for name in _KEPT if name in metrics},
    }


def _agents(envs: EnvSource, style: PlainStyle) -> Any:
    return lambda: EnvironmentAgent(
        envs=envs,
        style=style,
        max_tokens=_MAX_TOKENS,
        step_timeout_s=_FOREVER_S,
        episode_timeout_s=_FOREVER_S,
    )


def _advantages(cell: Cell, config: TrainerConfig) -> Advantages:
    usual = make_advantages(config.advantages)
    if cell.arm != "asymmetric":
        return usual
    return lambda groups: [[a + _LOWER_BASELINE for a in of_group] for of_group in usual(groups)]


class _LocalTrainer:
    """One rank of the trainer in this process, because a start of one takes longer than a cell."""

    def __init__(self, model: Path, config: TrainerConfig, folder: Path, seed: int) -> None:
        self._config, self._folder = config, folder
        self._start = (str(model), None, config, 0, 1, None, seed)
        self.version = 0
        self.exports: list[Path] = []

    def __enter__(self) -> "_LocalTrainer":
        self._rank = Rank()
        self._rank.start(*self._start)
        return self

    def __exit__(self, *exc_info: object) -> None:
        dist.destroy_process_group()

    def step(self, batch: Batch) -> dict[str, float]:
        (share,) = divide(batch.samples, self._config)
        metrics = self._rank.step(share, self.version)
        self.version += 1
        return metrics

    def export(self) -> Path:
        path = self._folder / f"version_{self.version}"
        if not path.exists():
            self._rank.export(str(path))
            self.exports.append(path)
        return path


class _SlowEnvs:
    """Environments whose steps take a lognormal time, decided by the cell's seed."""

    def __init__(self, envs: EnvSource, job: Job, seed: int) -> None:
        self._envs = envs
        self._mu = math.log(job.env_s) - job.env_sigma**2 / 2
        self._sigma = job.env_sigma
        self._rng = random.Random(seed)

    async def open(self) -> AsyncEnv:
        return _SlowEnv(await self._envs.open(), self)

    async def take_time(self) -> None:
        await asyncio.sleep(self._rng.lognormvariate(self._mu, self._sigma))


class _SlowEnv:
    def __init__(self, env: AsyncEnv, slow: _SlowEnvs) -> None:
        self.deterministic = env.deterministic
        self._env, self._slow = env, slow

    async def reset(self, task: Task) -> Observation:
        return await self._env.reset(task)

    async def step(self, action: str) -> Observation:
        await self._slow.take_time()
        return await self._env.step(action)

    def close(self) -> None:
        self._env.close()
