"""The rollout loop in a script of one's own, with the trainer beside it.

    flash train frozen_lake --steps 2
    flash export runs/frozen_lake/checkpoints/step_000002 --out policy
    flash worker --model policy --port 8000 &
    python examples/embed_the_loop.py policy http://127.0.0.1:8000

Each part can be another: any server that speaks vLLM's protocol, any model, any environment, and
any trainer that takes batches and writes safetensors.
"""

import asyncio
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer

from flash import (
    Agent,
    Episode,
    EpisodeRecord,
    Evaluation,
    InferenceHub,
    InlineEnvs,
    Observer,
    RolloutLoop,
    RolloutSettings,
    Task,
    Trainer,
    TrainerConfig,
    Worker,
    play,
)
from flash.agents import EnvironmentAgent, PlainStyle
from flash.envs.frozen_lake import FrozenLakeTextEnv


class Outcomes(Observer):
    """Counts what becomes of episodes: each is told of once, when it has ended."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        self.counts[f"{record.outcome} {record.reason}".strip()] += 1


async def main(
    model: str, workers: Sequence[str | Worker], *, steps: int, run_dir: Path, held_out: int = 64
) -> Evaluation:
    """Trains `model` on FrozenLake, then plays held-out lakes."""
    style = PlainStyle(AutoTokenizer.from_pretrained(model))

    def agents_for(split: Literal["train", "heldout"]) -> Callable[[], Agent]:
        envs = InlineEnvs(lambda: FrozenLakeTextEnv(split=split, max_turns=12))
        return lambda: EnvironmentAgent(envs=envs, style=style, max_tokens=4)

    outcomes = Outcomes()
    config = TrainerConfig(learning_rate=1e-3, threads=1)
    async with (
        Trainer(model=model, config=config, run_dir=run_dir) as trainer,
        InferenceHub(workers, weights=await trainer.export_weights()) as hub,
        RolloutLoop(
            hub,
            agent=agents_for("train"),
            tasks=(Task(seed) for seed in itertools.count()),
            batch_size=32,
            group_size=8,
            alpha=1,
            settings=RolloutSettings(on_stale="wait"),
            observers=[outcomes],
            trainer=trainer.state,
        ) as rollouts,
    ):
        for _ in range(steps):
            batch = await rollouts.next_batch()
            metrics = await trainer.step(batch)
            report = await rollouts.publish(await trainer.export_weights())
            gap = "" if report.gap is None else f", worker against trainer {report.gap.p90:.1e}"
            print(
                f"version {report.version}: success {batch.metrics['success_rate']:.0%}, "
                f"oldest token {batch.metrics['staleness/max']} versions, "
                f"KL to the sampling policy {metrics['kl_behaviour']:.3f}{gap}"
            )
        with rollouts.paused():
            evaluation = await play(
                hub,
                agents_for("heldout"),
                [Task(seed) for seed in range(held_out)],
                concurrency=rollouts.capacity,
            )
    print(f"episodes: {dict(outcomes.counts)}")
    return evaluation


if __name__ == "__main__":
    model, *urls = sys.argv[1:]
    evaluation = asyncio.run(main(model, urls, steps=10, run_dir=Path("runs/embedded")))
    print(f"success on held-out lakes: {evaluation.success_rate:.0%}")
