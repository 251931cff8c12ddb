"""Which small runs are killed: what their seed draws."""

import random
from dataclasses import dataclass
from typing import Any

TINY = {
    "batch_size": 8,
    "group_size": 4,
    "eval_every": 9,
    "eval.tasks": 4,
    "policy.layers": 1,
    "policy.hidden_size": 32,
    "policy.heads": 2,
    "warm_start.steps": 3,
    "warm_start.demonstrations": 12,
    "env.options": "{size: 4, max_turns: 4}",
    "env.hosts": 2,
    "reward": "{name: process, run: 'tests.crash.reward:score', concurrency: 2, retries: 4}",
    "trainer.learning_rate": 1e-3,
    "checkpoint.minutes": 0,
    "rollout.max_attempts": 6,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """A run, by its seed.

    `first_steps`: so many it is told at first, and then those of its settings. `postgres`: where
    its log is.
    """

    seed: int
    settings: dict[str, Any]
    first_steps: int
    postgres: bool


def draw(seed: int, *, steps: int, postgres: bool | None = None) -> Plan:
    """The run of that seed."""
    random_ = random.Random(seed)
    alpha = random_.choice((1, 2))
    settings: dict[str, Any] = {
        "seed": seed,
        "steps": steps,
        "alpha": alpha,
        "trainer.ranks": random_.choice((1, 2)),
        "checkpoint.every": random_.choice((0, 0, 7, 3)),
        "publish_every": random_.choice((1, 1, 2)),
        "stream": random_.random() < 0.3,
        "agent.samples": random_.choice(("whole", "turns")),
        "rollout.on_stale": random_.choice(("regenerate", "regenerate", "wait", "drop")),
        "rollout.redundant_groups": random_.choice((0, 0, 1)),
        "rollout.redundant_episodes": random_.choice((0, 0, 1)),
    }
    if random_.random() < 0.3:
        settings["rollout.filters"] = "tests.crash.reward:dull"
    drawn = random_.random() < 0.25
    return Plan(
        seed=seed,
        settings=TINY | settings,
        first_steps=random_.choice((steps, steps - 3)),
        postgres=drawn if postgres is None else postgres,
    )
