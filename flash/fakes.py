"""Fakes for tests and examples: a worker, environments and a prompt style that only keep time.

They run on the event loop's clock, so under virtual time a test of hours takes milliseconds. Each
is seeded: the same seed does the same.
"""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

from flash.errors import EnvFailure
from flash.hub.worker import WorkerFailure
from flash.types import AsyncEnv, Completion, Observation, SamplingParams, Task, UpdateMode

Range = tuple[float, float]


class FakeWorker:
    """A worker that samples nonsense, one token after another, with true versions.

    Args:
        token_s: seconds a token takes, drawn anew for each request.
        tokens: how many tokens a response has at most (min, max), within `max_tokens`.
        load_s: seconds a weight load takes.
    """

    def __init__(
        self,
        name: str,
        *,
        seed: int = 0,
        token_s: Range = (0.01, 0.01),
        tokens: tuple[int, int] = (1, 1_000_000),
        load_s: Range = (0.0, 0.5),
        version: int = 0,
    ) -> None:
        self.name = name
        self.version = version
        self.running = 0
        self.max_running_seen = 0
        self.started: list[str] = []
        self.aborted: list[str] = []
        self.loaded: list[Path] = []
        self._rng = random.Random(seed)
        self._token_s = token_s
        self._tokens = tokens
        self._load_s = load_s
        self._going = asyncio.Event()
        self._going.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._frozen = False  # paused, and not for the running requests to end
        self._aborts = 0  # counts `pause("abort")`; a request notices that it changed
        self._failures_planned = 0
        self._awake = asyncio.Event()
        self._awake.set()
        self._dead = False

    # ── what a test plants ───────────────────────────────────────────────────────────────────

    def fail_next(self, calls: int) -> None:
        """The next calls raise WorkerFailure."""
        self._failures_planned = calls

    def hang(self) -> None:
        """Sample nothing more, until `wake`."""
        self._awake.clear()

    def wake(self) -> None:
        """Go on after `hang`."""
        self._awake.set()

    def die(self) -> None:
        """Fail every call from now on, and those that wait."""
        self._dead = True

    # ── the Worker protocol ──────────────────────────────────────────────────────────────────

    async def generate(
        self, request_id: str, token_ids: Sequence[int], sampling: SamplingParams
    ) -> Completion:
        self._maybe_fail()
        await self._going.wait()
        self.running += 1
        self.max_running_seen = max(self.max_running_seen, self.running)
        self.started.append(request_id)
        self._idle.clear()
        try:
            return await self._sample(sampling)
        finally:
            self.running -= 1
            if not self.running:
                self._idle.set()

    async def abort(self, request_id: str) -> None:
        self._maybe_fail()
        self.aborted.append(request_id)

    async def pause(self, mode: UpdateMode) -> None:
        self._maybe_fail()
        self._going.clear()
        if mode == "wait":
            await self._idle.wait()
        else:
            self._frozen = True
            self._aborts += mode == "abort"

    async def load_weights(self, path: Path) -> None:
        self._maybe_fail()
        await asyncio.sleep(self._rng.uniform(*self._load_s))
        self.loaded.append(path)

    async def set_version(self, version: int) -> None:
        self._maybe_fail()
        self.version = version

    async def resume(self) -> None:
        self._maybe_fail()
        self._frozen = False
        self._going.set()

    async def check_health(self) -> None:
        self._maybe_fail()

    async def close(self) -> None:
        pass

    async def _sample(self, sampling: SamplingParams) -> Completion:
        wanted = min(sampling.max_tokens, self._rng.randint(*self._tokens))
        token_s = self._rng.uniform(*self._token_s)
        aborts = self._aborts
        versions: list[int] = []
        while len(versions) < wanted:
            await asyncio.sleep(token_s)
            await self._awake.wait()
            if self._dead:
                raise WorkerFailure(f"{self.name} is dead")
            if self._aborts != aborts:
                break
            if self._frozen:
                await self._going.wait()
            versions.append(self.version)
        ended = "length" if wanted == sampling.max_tokens else "stop"
        return Completion(
            token_ids=[self._rng.randrange(10, 100) for _ in versions],
            logprobs=[-self._rng.random() for _ in versions],
            versions=versions,
            finish_reason=ended if len(versions) == wanted else "abort",  # type: ignore[arg-type]
            worker=self.name,
        )

    def _maybe_fail(self) -> None:
        if self._dead:
            raise WorkerFailure(f"{self.name} is dead")
        if self._failures_planned:
            self._failures_planned -= 1
            raise WorkerFailure(f"{self.name} was told to fail")


class FakeEnvs:
    """Environments that take time, and fail and hang at the given rates, call by call.

    Args:
        turns: how many steps an episode has (min, max).
        step_s: seconds a reset or a step takes.
        fail_rate, hang_rate: the chance of a call to raise EnvFailure, or never to return.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        turns: tuple[int, int] = (1, 3),
        step_s: Range = (0.0, 1.0),
        fail_rate: float = 0.0,
        hang_rate: float = 0.0,
    ) -> None:
        self.open_now = 0
        self.turns = turns
        self.rng = random.Random(seed)
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
        self._envs = envs
        self._left = envs.rng.randint(*envs.turns)

    async def reset(self, task: Task) -> Observation:
        await self._envs.take_time()
        return Observation(text=f"task {task.seed}")

    async def step(self, action: str) -> Observation:
        await self._envs.take_time()
        self._left -= 1
        reward = float(self._envs.rng.random() < 0.5) if self._left == 0 else 0.0
        return Observation(text="next", reward=reward, terminated=self._left == 0)

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
