"""What it gains to compute rewards while others still sample, instead of when a batch is whole.

The same job in virtual time: agents of three turns on fake workers, a reward that takes seconds
(exponential, mean 10), a trainer that takes 10, 64 samples a batch. `beside` is the reward stage of
each episode; `after` computes all rewards of a batch once it is whole, with as much concurrency.

    python benchmarks/reward.py
"""

import argparse
import asyncio
import json
import random
from pathlib import Path

from flash import virtual_time
from flash.agents import EnvironmentAgent
from flash.fakes import FakeEnvs, FakeStyle, FakeWorker
from flash.hub.hub import InferenceHub
from flash.reward.stage import FunctionScorer, RewardStage
from flash.rollout.loop import RolloutLoop
from flash.types import Task, Transcript, Weights

RESULTS = Path(__file__).parent / "results" / "reward.json"
BATCH, GROUP, CONCURRENCY = 64, 8, 16
REWARD_S, TRAIN_S = 10.0, 10.0


async def seconds_a_step(*, alpha: float, beside: bool, steps: int, seed: int) -> float:
    """Mean, over all but the first two steps, in which nothing is under way yet."""
    rng = random.Random(seed)
    envs = FakeEnvs(seed=seed, turns=(3, 3), step_s=(0.5, 1.5))
    clock = asyncio.get_running_loop().time

    async def score(transcript: Transcript | None) -> float:
        await asyncio.sleep(rng.expovariate(1 / REWARD_S))
        return rng.random()

    stage = RewardStage(
        FunctionScorer(score), decode=str, concurrency=CONCURRENCY, timeout_s=1e6, retries=0
    )

    async def score_batch(room: asyncio.Semaphore) -> None:
        async def one() -> None:
            async with room:
                await score(None)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(BATCH):
                tasks.create_task(one())

    def agent() -> EnvironmentAgent:
        return EnvironmentAgent(
            envs=envs, style=FakeStyle(), max_tokens=200, episode_timeout_s=1e6,
            reward_stage=stage if beside else None,
        )  # fmt: skip

    workers = [FakeWorker(f"w{n}", seed=seed + n, token_s=(0.05, 0.15)) for n in range(4)]
    tasks = (Task(task) for task in range(10**9))
    async with (
        InferenceHub(workers, max_running=16) as hub,
        RolloutLoop(
            hub, agent=agent, tasks=tasks, batch_size=BATCH, group_size=GROUP, alpha=alpha
        ) as rollouts,
    ):
        began = clock()
        for step in range(steps + 2):
            if step == 2:
                began = clock()
            batch = await rollouts.next_batch()
            if not beside:
                await score_batch(asyncio.Semaphore(CONCURRENCY))
            await asyncio.sleep(TRAIN_S)
            await rollouts.publish(Weights(version=batch.version + 1, path=Path("/fake")))
        return (clock() - began) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows = []
    print("alpha  after: s/step  beside: s/step  gain")
    for alpha in (0, 1, 2):
        after, beside = (
            virtual_time.run(
                seconds_a_step(alpha=alpha, beside=here, steps=options.steps, seed=options.seed)
            )
            for here in (False, True)
        )
        rows.append({"alpha": alpha, "after_s": after, "beside_s": beside})
        print(f"{alpha:5} {after:14.1f} {beside:15.1f} {after / beside:5.2f}x")
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
