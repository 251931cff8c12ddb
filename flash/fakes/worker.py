"""A worker that samples nonsense with true versions, and a pool of such workers."""

import asyncio
import contextlib
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from flash.hub.worker import OnExit, OnReady, OnTokens, Worker, WorkerFailure
from flash.types import (
    Completion,
    Experts,
    FinishReason,
    SamplingParams,
    UpdateMode,
    Weights,
)

Seconds = tuple[float, float] | Callable[[random.Random], float]
Script = Callable[[Sequence[int], SamplingParams], Sequence[int]]


@dataclass(slots=True, eq=False)
class _Run:
    """One request that a FakeWorker samples."""

    wanted: int
    first_token_s: float
    token_s: float
    worked_s: float = 0.0
    versions: list[int] = field(default_factory=list)
    aborted: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # what it goes by

    @property
    def left_s(self) -> float:
        return self.first_token_s + self.wanted * self.token_s - self.worked_s

    def finish_token(self, seconds: float) -> None:
        """What `seconds` of a freeze bring: the token under way gets done, and no other begins."""
        next_at_s = self.first_token_s + (len(self.versions) + 1) * self.token_s
        self.worked_s = min(self.worked_s + seconds, max(self.worked_s, next_at_s))

    def work(self, seconds: float, version: int) -> None:
        """What `seconds` of sampling with `version` bring."""
        self.worked_s += seconds
        if self.left_s < 1e-9:
            tokens = self.wanted
        else:
            whole = (self.worked_s - self.first_token_s) / self.token_s if self.token_s else 0.0
            # What interrupts in the moment in which a token is done comes before the token.
            tokens = max(len(self.versions), math.floor(whole - 1e-9))
        self.versions += [version] * (tokens - len(self.versions))


_MEMORY = ("weights", "rest")


class FakeWorker:
    """A worker that samples nonsense, or what a script says, with true versions.

    It has the semantics of a real one: a pause freezes, aborts or drains what runs; under `keep`
    a request goes on where it was, and its later tokens, with the one under way, carry the new
    version. It costs one timer a request and not one a token, so that simulations stay cheap.

    Args:
        token_s: seconds a token takes, drawn anew for each request.
        first_token_s: seconds before that, for the prompt.
        tokens: how many tokens a response has at most (min, max), within `max_tokens`.
        load_s: seconds a weight load takes.
        recompute_s: seconds it takes to have what runs computed anew.
        room: how many requests it samples at the same time; the others wait inside.
        tell_s: tell of tokens before the answer is whole, so often; None: never.
        script: the response to a prompt; without it token ids are drawn.
        experts: it says, where it is asked, of each token that its experts are so many times its
            place.
        constrains: whether it says that it keeps to constraints; what it says is the script's all
            the same.
    """

    def __init__(
        self,
        name: str,
        *,
        seed: int = 0,
        token_s: Seconds = (0.01, 0.01),
        first_token_s: Seconds = (0.0, 0.0),
        tokens: tuple[int, int] = (1, 1_000_000),
        load_s: Seconds = (0.0, 0.5),
        recompute_s: float = 0.0,
        version: int = 0,
        room: int | None = None,
        tell_s: float | None = None,
        script: Script | None = None,
        experts: int = 0,
        constrains: bool = False,
    ) -> None:
        self.name = name
        self.constrains = constrains
        self._experts = experts
        self.version = version
        self.running = 0
        self.max_running_seen = 0
        self.started: list[str] = []
        self.aborted: list[str] = []
        self.loaded: list[Path] = []
        self.recomputed = 0
        self._rng = random.Random(seed)
        self._token_s = token_s
        self._first_token_s = first_token_s
        self._tokens = tokens
        self._load_s = load_s
        self._recompute_s = recompute_s
        self._room = math.inf if room is None else room
        self._tell_s = tell_s
        self._script = script
        self._runs: dict[str, _Run] = {}
        self._paused = False  # nothing begins
        self._frozen = False  # nor does what runs go on
        self._hung = False
        self._dead = False
        self._awake = set(_MEMORY)  # the memory that it has
        self._has_weights = True
        self._failures_planned = 0
        self._lies: list[dict[str, Any]] = []
        self._losses_planned = 0
        # For those that wait to begin, or for others to end; each is set once and replaced.
        self._ended = asyncio.Event()

    # ── what a test plants ───────────────────────────────────────────────────────────────────

    def fail_next(self, calls: int) -> None:
        """The next calls raise WorkerFailure."""
        self._failures_planned = calls

    def lie_next(self, **changes: Any) -> None:
        """The next answer to a request has these fields changed: `logprobs=[nan]`, say."""
        self._lies.append(changes)

    def lose_next(self, answers: int) -> None:
        """The answers to the next requests never come; others do."""
        self._losses_planned = answers

    def hang(self) -> None:
        """Sample nothing more, until `wake`."""
        self._hung = True
        self._tell()

    def wake(self) -> None:
        """Go on after `hang`."""
        self._hung = False
        self._tell()

    def die(self) -> None:
        """Fail every call from now on, and those that wait."""
        self._dead = True
        self._awake.clear()
        self._tell()

    def restart(self, *, version: int = 0) -> None:
        """Live again after `die`, as a server that was started anew: with its first weights."""
        self._dead = self._hung = self._paused = self._frozen = False
        self._awake, self._has_weights = set(_MEMORY), True
        self.version = version
        self._tell()

    @property
    def dead(self) -> bool:
        return self._dead

    @property
    def has_memory(self) -> bool:
        """Any of the GPU that it may share: not while it sleeps, nor when it is dead."""
        return bool(self._awake)

    # ── the Worker protocol ──────────────────────────────────────────────────────────────────

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        self._maybe_fail()
        while self._paused or self.running >= self._room:
            await self._ended.wait()
            self._check_alive()
        self.running += 1
        self.max_running_seen = max(self.max_running_seen, self.running)
        self.started.append(request_id)
        try:
            if self._losses_planned:
                self._losses_planned -= 1
                await asyncio.Event().wait()
            tell = on_tokens if self._tell_s is not None else None
            completion = await self._sample(request_id, token_ids, sampling, tell)
        finally:
            self.running -= 1
            self._ended = _fired(self._ended)
        return replace(completion, **self._lies.pop(0)) if self._lies else completion

    async def abort(self, request_id: str) -> None:
        self._maybe_fail()
        self.aborted.append(request_id)
        if request_id in self._runs:
            self._runs[request_id].aborted = True
            self._tell()

    async def pause(self, mode: UpdateMode) -> None:
        self._maybe_fail()
        self._paused = True
        if mode == "wait":
            while self.running:
                await self._ended.wait()
                self._check_alive()
        self._frozen = True
        if mode == "abort":
            for run in self._runs.values():
                run.aborted = True
        self._tell()

    async def load_weights(self, weights: Weights) -> None:
        self._maybe_fail()
        if "weights" not in self._awake:
            raise WorkerFailure(f"{self.name} sleeps, and has no memory for weights")
        await asyncio.sleep(self._draw(self._load_s))
        self._check_alive()
        self._has_weights = True
        self.loaded.append(weights.path)

    async def recompute(self) -> None:
        self._maybe_fail()
        if self._recompute_s:
            await asyncio.sleep(self._recompute_s)
            self._check_alive()
        self.recomputed += 1

    async def set_version(self, version: int) -> None:
        self._maybe_fail()
        self.version = version
        self._tell()

    async def resume(self) -> None:
        self._maybe_fail()
        if len(self._awake) < len(_MEMORY) or not self._has_weights:
            raise WorkerFailure(f"{self.name} sleeps, or has no weights")
        self._paused = self._frozen = False
        self._tell()

    async def sleep(self, mode: UpdateMode) -> None:
        await self.pause(mode)
        self._awake.clear()
        self._has_weights = False

    async def wake_weights(self) -> None:
        self._maybe_fail()
        self._awake.add("weights")

    async def wake_rest(self) -> None:
        self._maybe_fail()
        self._awake.add("rest")
        await self.resume()

    async def check_health(self) -> None:
        self._maybe_fail()

    async def close(self) -> None:
        pass

    # ── sampling ─────────────────────────────────────────────────────────────────────────────

    async def _sample(
        self,
        request_id: str,
        prompt: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None,
    ) -> Completion:
        if self._script is None:
            response: Sequence[int] = ()
            length = self._rng.randint(*self._tokens)
        else:
            response = self._script(prompt, sampling)
            length = len(response)
        wanted = min(sampling.max_tokens, length)
        run = _Run(wanted, self._draw(self._first_token_s), self._draw(self._token_s))
        self._runs[request_id] = run
        clock = asyncio.get_running_loop().time
        token_ids: list[int] = []
        logprobs: list[float] = []
        try:
            while len(run.versions) < wanted and not run.aborted:
                version, began = self.version, clock()
                run.changed.clear()
                if self._hung:
                    await run.changed.wait()
                elif self._frozen:
                    await run.changed.wait()
                    run.finish_token(clock() - began)
                else:
                    with contextlib.suppress(TimeoutError):
                        until_tell = math.inf if self._tell_s is None else self._tell_s
                        async with asyncio.timeout(min(run.left_s, until_tell)):
                            await run.changed.wait()
                    run.work(clock() - began, version)
                known = len(token_ids)
                for place in range(known, len(run.versions)):
                    token_ids.append(response[place] if response else self._rng.randrange(10, 100))
                    logprobs.append(-self._rng.random())
                if on_tokens is not None and len(token_ids) > known:
                    on_tokens(token_ids[known:], logprobs[known:])
                self._check_alive()
        finally:
            del self._runs[request_id]
        ended: FinishReason = "length" if wanted == sampling.max_tokens else "stop"
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            versions=run.versions,
            temperature=sampling.temperature,
            finish_reason=ended if len(token_ids) == wanted else "abort",
            worker=self.name,
            experts=self._experts_of(len(prompt) + len(token_ids), sampling),
        )

    def _experts_of(self, tokens: int, sampling: SamplingParams) -> Experts | None:
        if sampling.experts_from is None or not self._experts:
            return None
        places = np.arange(sampling.experts_from, tokens - 1, dtype=np.int16)
        return np.repeat(places[:, None], self._experts, axis=1)

    def _draw(self, seconds: Seconds) -> float:
        return seconds(self._rng) if callable(seconds) else self._rng.uniform(*seconds)

    def _tell(self) -> None:
        """Whoever waits here looks anew at how things are."""
        for run in self._runs.values():
            run.changed.set()
        self._ended = _fired(self._ended)

    def _maybe_fail(self) -> None:
        self._check_alive()
        if self._failures_planned:
            self._failures_planned -= 1
            raise WorkerFailure(f"{self.name} was told to fail")

    def _check_alive(self) -> None:
        if self._dead:
            raise WorkerFailure(f"{self.name} is dead")


class FakePool:
    """A pool of fake workers: one that is killed lives again after a while, with its first weights.

    Args:
        start_s: seconds that a start takes.
        lives: how often a worker is started before its death is final.
    """

    def __init__(
        self, workers: Sequence[FakeWorker], *, start_s: float = 30.0, lives: int = 1_000_000
    ) -> None:
        self.deaths = 0
        self._workers = list(workers)
        self._start_s = start_s
        self._lives = {worker.name: lives for worker in workers}
        self._timers: list[asyncio.TimerHandle] = []
        self._holds = False
        self._held: list[FakeWorker] = []

    async def start(self, on_exit: OnExit, on_ready: OnReady) -> list[Worker]:
        self._on_exit, self._on_ready = on_exit, on_ready
        return list(self._workers)

    def restart(self, worker: Worker) -> None:
        """As the hub asks for it; `kill` in a test's words."""
        (fake,) = (known for known in self._workers if known is worker)
        if not fake.dead:
            self.kill(fake)

    def kill(self, worker: FakeWorker) -> None:
        """The worker's process dies, and its pool tells so and starts it anew."""
        self.deaths += 1
        self._lives[worker.name] -= 1
        worker.die()
        final = self._lives[worker.name] == 0
        self._on_exit(worker, f"{worker.name} was killed", final)
        if not final:
            loop = asyncio.get_running_loop()
            self._timers.append(loop.call_later(self._start_s, self._return, worker))

    def hold(self) -> None:
        self._holds = True

    def release(self) -> None:
        self._holds = False
        held, self._held = self._held, []
        for worker in held:
            self._return(worker)

    async def stop(self) -> None:
        for timer in self._timers:
            timer.cancel()

    def _return(self, worker: FakeWorker) -> None:
        if self._holds:
            self._held.append(worker)
            return
        worker.restart()
        self._on_ready(worker)


def _fired(event: asyncio.Event) -> asyncio.Event:
    """Wakes those that wait; returns the event for those that come later."""
    event.set()
    return asyncio.Event()
