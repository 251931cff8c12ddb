"""Environments and a prompt style that only keep time."""

import asyncio
import random
from collections.abc import Sequence

from flash.errors import EnvFailure
from flash.types import AsyncEnv, Observation, Task


class FakeEnvs:
    """Environments that take time, and fail and hang at the given rates, call by call.

    Args:
        turns: how many steps an episode has (min, max).
        step_s: seconds a reset or a step takes.
        fail_rate, hang_rate: the chance of a call to raise EnvFailure, or never to return.
        deterministic: a task and the actions decide what is observed, and nothing else.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        turns: tuple[int, int] = (1, 3),
        step_s: tuple[float, float] = (0.0, 1.0),
        fail_rate: float = 0.0,
        hang_rate: float = 0.0,
        deterministic: bool = False,
    ) -> None:
        self.open_now = 0
        self.turns = turns
        self.rng = random.Random(seed)
        self.deterministic = deterministic
        self._step_s = step_s
        self._fail_rate = fail_rate
        self._hang_rate = hang_rate

    async def open(self) -> AsyncEnv:
        self.open_now += 1
        return _FakeEnv(self)

    async def take_time(self) -> None:
        """One call's latency, or its failure."""
        luck = self.rng.random()
        if luck < self._hang_rate:
            await asyncio.Event().wait()
        await asyncio.sleep(self.rng.uniform(*self._step_s))
        if luck < self._hang_rate + self._fail_rate:
            raise EnvFailure("planned")


class _FakeEnv:
    def __init__(self, envs: FakeEnvs) -> None:
        self.deterministic = envs.deterministic
        self._envs = envs
        self._rng = envs.rng  # chance is shared by all that are open
        self._left = 0

    async def reset(self, task: Task) -> Observation:
        if self.deterministic:
            self._rng = random.Random(task.seed)
        self._left = self._rng.randint(*self._envs.turns)
        await self._envs.take_time()
        return Observation(text=f"task {task.seed}")

    async def step(self, action: str) -> Observation:
        await self._envs.take_time()
        self._left -= 1
        reward = float(self._rng.random() < 0.5) if self._left == 0 else 0.0
        text = f"after {action}" if self.deterministic else "next"
        return Observation(text=text, reward=reward, terminated=self._left == 0)

    def close(self) -> None:
        self._envs.open_now -= 1


class FakeStyle:
    """A prompt style for fake environments: three tokens first, two between the turns."""

    stop_token_ids: tuple[int, ...] = (1,)

    def first(self, observation: Observation) -> list[int]:
        return [2, 3, 4]

    def next(self, observation: Observation, sampled: Sequence[int]) -> list[int]:
        return [5, 6]

    def action(self, sampled: Sequence[int]) -> str:
        return " ".join(map(str, sampled))
