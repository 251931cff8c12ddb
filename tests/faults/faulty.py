"""The parts of a run that go wrong: workers, environments, rewards and agents that draw a fault.

Each draws from its own generator, so a schedule is the same whenever its seed is. A rate is the
chance of a fault in one call.
"""

import asyncio
import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from flash.agents.environment_agent import EnvironmentAgent
from flash.errors import EnvFailure
from flash.fakes import FakeEnvs, FakePool, FakeWorker
from flash.hub.worker import WorkerFailure
from flash.types import Completion, Observation

Say = Callable[..., None]


@dataclass(slots=True)
class Truth:
    """Every token that a worker told of: its logprob, its version, and the token before it.

    No token id is given twice, so a token that is trained can be looked up.
    """

    tokens: dict[int, tuple[np.float32, int, int]] = field(default_factory=dict)
    ids: itertools.count = field(default_factory=lambda: itertools.count(1000))

    def note(
        self,
        before: int,
        token_ids: Sequence[int],
        logprobs: Sequence[float],
        versions: Sequence[int],
    ) -> None:
        for token, logprob, version in zip(token_ids, logprobs, versions, strict=True):
            self.tokens[token] = np.float32(logprob), version, before
            before = token


class Faults:
    """Draws a fault, or none, for one call."""

    def __init__(self, seed: object, rates: Mapping[str, float], say: Say) -> None:
        self.rng = random.Random(str(seed))
        self._rates = rates
        self._say = say

    def draw(self, *kinds: str) -> str | None:
        for kind in kinds:
            rate = self._rates.get(kind, 0.0)
            if rate and self.rng.random() < rate:
                self._say("fault", kind)
                return kind
        return None

    async def befall(self, *kinds: str) -> str | None:
        """The faults that any awaited call can have; others are the caller's to act on."""
        kind = self.draw(*kinds)
        what = kind.rsplit("_", 1)[-1] if kind else ""
        if what == "hang":
            await asyncio.Event().wait()
        elif what == "slow":
            await asyncio.sleep(self.rng.uniform(1, 15))
        elif what == "cancel":
            raise asyncio.CancelledError
        elif what == "bug":
            await asyncio.sleep(self.rng.random())
            raise RuntimeError("planned")
        return kind


class FaultyWorker(FakeWorker):
    """Crashes, hangs, is slow, loses answers, tells of them twice, lies, fails half-way."""

    pool: FakePool | None = None
    on_answer: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, name: str, *, faults: Faults, truth: Truth, **options: Any) -> None:
        super().__init__(name, script=self._respond, token_s=self._token_time, **options)
        self.cancelled: list[str] = []
        self._faults = faults
        self._truth = truth

    def _respond(self, prompt: Sequence[int], sampling: object) -> list[int]:
        return list(itertools.islice(self._truth.ids, self._faults.rng.randint(1, 10)))

    def _token_time(self, rng: random.Random) -> float:
        slow = self._faults.draw("worker_slow") is not None
        return rng.uniform(0.01, 0.3) * (30 if slow else 1)

    async def generate(self, request_id, token_ids, sampling, on_tokens=None):
        fault = self._faults.draw(
            "worker_fail", "worker_crash", "worker_hang", "answer_lost", "answer_doubled",
            "answer_false",
        )  # fmt: skip
        soon = self._faults.rng.random() * 2
        loop = asyncio.get_running_loop()
        if fault == "worker_fail":
            raise WorkerFailure("planned")
        if fault == "worker_crash":
            loop.call_later(soon, self.crash)
        elif fault == "worker_hang":
            loop.call_later(soon, self.hang)
            loop.call_later(soon + self._faults.rng.uniform(5, 100), self.wake)
        try:
            answer = await super().generate(
                request_id, token_ids, sampling, self._teller(request_id, token_ids, on_tokens)
            )
            if fault == "answer_lost":
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.append(request_id)
            raise
        finally:
            self.on_answer()
        self._truth.note(token_ids[-1], answer.token_ids, answer.logprobs, answer.versions)
        if fault == "answer_doubled" and on_tokens is not None:
            again = answer.token_ids, answer.logprobs
            loop.call_soon(on_tokens, *again)
            loop.call_later(soon, on_tokens, *again)
        return self._falsified(answer) if fault == "answer_false" else answer

    def _teller(self, request_id, prompt, on_tokens):
        told, before = 0, prompt[-1]

        def tell(token_ids, logprobs):
            nonlocal told, before
            versions = self._runs[request_id].versions[told : told + len(token_ids)]
            self._truth.note(before, token_ids, logprobs, versions)
            told, before = told + len(token_ids), token_ids[-1]
            on_tokens(token_ids, logprobs)

        return tell

    def _falsified(self, answer: Completion) -> Completion:
        """What a hub can see to be false."""
        return self._faults.rng.choice([
            replace(answer, logprobs=[*answer.logprobs[:-1], math.nan]),
            replace(answer, token_ids=answer.token_ids[:-1]),
            replace(answer, versions=[10**6] * len(answer.versions)),
            replace(answer, token_ids=[], logprobs=[], versions=[], finish_reason="stop"),
        ])  # fmt: skip

    def crash(self) -> None:
        """Its process dies. A pool starts it anew; without one somebody else does."""
        if self._dead:
            return
        if self.pool is not None:
            self.pool.kill(self)
        else:
            self.die()
            again = self._faults.rng.uniform(1, 30)
            asyncio.get_running_loop().call_later(again, self.restart)

    async def pause(self, mode):
        await self._control()
        await super().pause(mode)

    async def load_weights(self, weights):
        await super().load_weights(weights)
        await self._control()

    async def set_version(self, version):
        await self._control()
        await super().set_version(version)

    async def resume(self):
        await super().resume()
        await self._control()

    async def check_health(self):
        await self._control()
        await super().check_health()

    async def abort(self, request_id):
        await self._faults.befall("abort_hang")
        await super().abort(request_id)

    async def _control(self) -> None:
        kind = await self._faults.befall("control_fail", "control_hang", "control_crash")
        if kind == "control_crash":
            self.crash()
        if kind == "control_fail":
            raise WorkerFailure("planned")
        self._check_alive()


class FaultyEnvs(FakeEnvs):
    """Fail, hang, are slow, have bugs, cancel themselves: when opened as in every call."""

    def __init__(self, *, faults: Faults, **options: Any) -> None:
        super().__init__(**options)
        self._faults = faults

    async def open(self):
        await self._go_wrong()
        return await super().open()

    async def take_time(self) -> None:
        await self._go_wrong()
        await super().take_time()

    async def _go_wrong(self) -> None:
        kinds = "env_fail", "env_hang", "env_slow", "env_bug", "env_cancel"
        if await self._faults.befall(*kinds) == "env_fail":
            raise EnvFailure("planned")


class FaultyAgent(EnvironmentAgent):
    """Crashes, leaves, reports twice, and takes its time to let go."""

    def __init__(self, *, faults: Faults, **options: Any) -> None:
        super().__init__(reward=self._faulty_reward, **options)
        self._faults = faults

    async def play(self, episode):
        await self._faults.befall("agent_bug", "agent_cancel")
        try:
            return await super().play(episode)
        finally:
            if self._faults.draw("agent_lingers"):
                await asyncio.sleep(self._faults.rng.uniform(0, 5))

    async def run(self, report):
        def report_twice(episode, end):
            report(episode, end)
            if self._faults.draw("agent_reports_twice"):
                report(episode, end)

        if self._faults.draw("agent_leaves"):
            await self.mailbox.get()
            return
        await super().run(report_twice)

    async def _faulty_reward(self, seen: Sequence[Observation]) -> float:
        await self._faults.befall("reward_bug", "reward_hang", "reward_slow", "reward_cancel")
        return float(self._faults.rng.random() < 0.5)
