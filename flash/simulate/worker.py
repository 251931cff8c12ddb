"""A simulated inference worker: continuous batching, a cache of keys and values, preemption.

Time passes from event to event (a request begins, ends, runs out of room), never from token to
token. Between two events n requests with C tokens of context between them decode one token a step,
which takes `step_s + n·request_s + C·context_s`, and C grows by n a step: so the time of k steps is
a quadratic of k, and the steps done in a time are its root. Prompts are worked on one after
another, and decoding stands still meanwhile, as it does in sum when prefill is cut into chunks.
"""

import asyncio
import heapq
import itertools
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from flash.hub.worker import OnTokens
from flash.simulate.cache import PrefixCache
from flash.simulate.scenario import WorkersConfig
from flash.simulate.timeline import Timeline
from flash.simulate.world import Script, World
from flash.types import Completion, FinishReason, SamplingParams, UpdateMode, Weights

_WATERMARK = 0.01  # of the room stays free when a request begins, as in vLLM


@dataclass(slots=True, eq=False)
class _Job:
    """One request. `sampled` counts tokens until `since_step`; while it decodes there are more."""

    script: Script
    prompt_tokens: int
    wanted: int
    sampling: SamplingParams
    answer: asyncio.Future[Completion]
    began_s: float
    sampled: float = 0.0
    since_step: float = 0.0
    end: float = 0.0
    versions: list[tuple[float, int]] = field(default_factory=list)  # (from which token, version)


class SimulatedWorker:
    """The hub's `Worker`, in virtual time.

    When it runs out of room the request that began last is preempted and starts anew later, its
    sampled tokens as part of its prompt. What ended stays in the cache for the episode's next turn
    and for others of its task, until there is no room or the weights change.
    """

    constrains = False

    def __init__(
        self, name: str, config: WorkersConfig, world: World, timeline: Timeline | None = None
    ) -> None:
        self.name = name
        self.version = 0
        self.preemptions = 0
        self.decoded_tokens = 0.0
        self.prefilled_tokens = 0.0
        self.cached_tokens = 0.0
        self._config = config
        self._world = world
        self._timeline = timeline
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[_Job] = deque()
        self._prefilling: _Job | None = None
        self._prefill_left_s = 0.0
        self._decoding: dict[_Job, None] = {}  # in the order in which they began
        self._ends: list[tuple[float, int, _Job]] = []  # by step; also of those that ended early
        self._jobs: dict[str, _Job] = {}
        self._numbers = itertools.count()
        self._cache = PrefixCache()
        self._context = 0.0  # tokens of those that decode
        self._steps = 0.0  # decode steps since the start, at `_at`
        self._at = 0.0
        self._frozen = False
        self._timer: asyncio.TimerHandle | None = None
        self._shown = 0  # in the timeline: how many decode, and since when any do
        self._works_since: float | None = None
        self._drained = asyncio.Event()

    # ── the Worker protocol ──────────────────────────────────────────────────────────────────

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        script = self._world.script(token_ids[0])
        grain = self._world.grain
        already = (len(token_ids) - script.context) * grain
        left = max(1, script.response_tokens[script.turn] - already)
        job = _Job(
            script=script,
            prompt_tokens=len(token_ids) * grain,
            wanted=min(left, sampling.max_tokens * grain),
            sampling=sampling,
            answer=self._loop.create_future(),
            began_s=self._loop.time(),
        )
        self._jobs[request_id] = job
        self._waiting.append(job)
        # While a prompt is worked on nothing begins, and what happens next is known.
        if self._prefilling is None:
            self._advance()
            self._plan()
        try:
            answer = await job.answer
        finally:
            del self._jobs[request_id]
            left = not job.answer.done() or job.answer.cancelled()
            if left:
                self._advance()
                self._remove(job)
                self._plan()
            if not self._jobs:
                self._drained.set()
            # An answer that comes at once tells of them itself.
            if on_tokens is not None and (left or self._config.overhead_s):
                entries = self._whole_entries(job)
                on_tokens([script.number] * entries, [-1.0] * entries)
        if self._config.overhead_s:
            await asyncio.sleep(self._config.overhead_s)
        return answer

    async def abort(self, request_id: str) -> None:
        """A request that is not waited for any more has gone already."""

    async def pause(self, mode: UpdateMode) -> None:
        if mode == "wait":
            while self._jobs:
                self._drained.clear()
                await self._drained.wait()
        self._advance()
        self._frozen = True
        if mode == "abort":
            for job in list(self._jobs.values()):
                self._remove(job)
                self._answer(job, "abort")
        self._plan()

    async def load_weights(self, weights: Weights) -> None:
        began = self._loop.time()
        if self._config.load_s:
            await asyncio.sleep(self._config.load_s)
        self._cache.clear()  # computed with the weights before
        if self._timeline is not None:
            self._timeline.worker(self.name, "load weights", began)

    async def recompute(self) -> None:
        """Takes no time here: it is not known what it takes a server."""

    async def set_version(self, version: int) -> None:
        self._advance()
        self.version = version
        for job in self._jobs.values():
            if job.versions:
                job.versions.append((self._sampled(job), version))

    async def resume(self) -> None:
        self._advance()
        self._frozen = False
        self._plan()

    async def sleep(self, mode: UpdateMode) -> None:
        raise AssertionError("a simulated worker has GPUs of its own")

    async def wake_weights(self) -> None:
        raise AssertionError("a simulated worker has GPUs of its own")

    async def wake_rest(self) -> None:
        raise AssertionError("a simulated worker has GPUs of its own")

    async def check_health(self) -> None:
        pass

    async def close(self) -> None:
        self._frozen = True
        self._plan()

    # ── time ─────────────────────────────────────────────────────────────────────────────────

    def _advance(self) -> None:
        """Brings prefill and decoding up to now."""
        now = self._loop.time()
        passed_s, self._at = now - self._at, now
        if self._frozen or passed_s == 0:
            return
        if self._prefilling is not None:
            self._prefill_left_s -= passed_s
        elif self._decoding:
            self._decode(self._steps_in(passed_s))

    def _decode(self, steps: float) -> None:
        self._steps += steps
        self._context += steps * len(self._decoding)
        self.decoded_tokens += steps * len(self._decoding)

    def _rates(self) -> tuple[float, float]:
        """(a, b): k steps from now take a·k + b·k²/2 seconds."""
        n, config = len(self._decoding), self._config
        first = config.step_s + n * config.request_s + self._context * config.context_s
        return first, n * config.context_s

    def _steps_in(self, seconds: float) -> float:
        a, b = self._rates()
        if b * seconds < 1e-9 * a * a:  # so little growth that the root would lose its digits
            return seconds / a
        return (math.sqrt(a * a + 2 * b * seconds) - a) / b

    def _plan(self) -> None:
        """Begins what can begin, and sets the timer for what happens next."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        may_begin = self._prefilling is None and not self._frozen
        if may_begin and self._waiting and self._has_room(self._waiting[0]):
            self._begin(self._waiting.popleft())
        if self._timeline is not None:
            self._show_load(self._timeline)
        if self._frozen:
            return
        if self._prefilling is not None:
            left_s = max(0.0, self._prefill_left_s)
            self._timer = self._loop.call_later(left_s, self._end_prefill)
        elif self._decoding:
            while (
                self._ends[0][2] not in self._decoding or self._ends[0][0] != self._ends[0][2].end
            ):
                heapq.heappop(self._ends)
            steps = self._ends[0][0] - self._steps
            room = self._config.kv_tokens - self._context
            if len(self._decoding) > 1:
                steps = min(steps, room / len(self._decoding))
            a, b = self._rates()
            seconds = a * steps + b * steps * steps / 2
            self._timer = self._loop.call_later(seconds, self._end_steps, self._steps + steps)

    # ── one request ──────────────────────────────────────────────────────────────────────────

    def _has_room(self, job: _Job) -> bool:
        free = self._config.kv_tokens * (1 - _WATERMARK) - self._context
        return job.prompt_tokens + job.sampled <= free or not self._decoding

    def _begin(self, job: _Job) -> None:
        """Its prompt is next; what the cache holds of it costs nothing."""
        tokens = job.prompt_tokens + job.sampled
        cached = min(
            tokens - 1,
            max(
                self._cache.of(("task", job.script.task)),
                self._cache.take(("episode", job.script.number)),
            ),
        )
        self.prefilled_tokens += tokens - cached
        self.cached_tokens += cached
        self._prefilling = job
        self._prefill_left_s = (tokens - cached) * self._config.prefill_s

    def _end_prefill(self) -> None:
        self._timer = None
        self._at = self._loop.time()
        job = self._prefilling
        assert job is not None
        self._prefilling = None
        if not job.versions:
            job.versions.append((0, self.version))
        if job.script.turn == 0:
            self._cache.keep(("task", job.script.task), job.script.prompt_tokens)
        job.since_step = self._steps
        job.end = self._steps + job.wanted - job.sampled
        heapq.heappush(self._ends, (job.end, next(self._numbers), job))
        self._decoding[job] = None
        self._context += job.prompt_tokens + job.sampled
        self._cache.shrink(self._config.kv_tokens - self._context)
        self._plan()

    def _end_steps(self, steps: float) -> None:
        """The decode steps up to this one are done: a request ended, or there is no more room."""
        self._timer = None
        self._at = self._loop.time()
        self._decode(steps - self._steps)
        self._steps = steps
        ended = False
        while self._ends and self._ends[0][0] <= steps + 1e-6:
            end, _, job = heapq.heappop(self._ends)
            if job in self._decoding and end == job.end:
                ended = True
                self._stop(job)
                job.sampled = job.wanted
                self._cache.keep(("episode", job.script.number), job.prompt_tokens + job.wanted)
                reached = job.wanted == job.sampling.max_tokens * self._world.grain
                self._answer(job, "length" if reached else "stop")
        if not ended:
            youngest = next(reversed(self._decoding))
            self._stop(youngest)
            self._waiting.appendleft(youngest)
            self.preemptions += 1
        self._cache.shrink(self._config.kv_tokens - self._context)
        self._plan()

    def _stop(self, job: _Job) -> None:
        """It decodes no more."""
        job.sampled = self._sampled(job)
        del self._decoding[job]
        self._context -= job.prompt_tokens + job.sampled
        if not self._decoding:
            self._context = 0.0

    def _sampled(self, job: _Job) -> float:
        if job in self._decoding:
            return job.sampled + self._steps - job.since_step
        return job.sampled

    def _whole_entries(self, job: _Job) -> int:
        return math.floor((job.sampled + 1e-6) / self._world.grain)

    def _remove(self, job: _Job) -> None:
        """Wherever it is."""
        if job in self._decoding:
            self._stop(job)
        elif job is self._prefilling:
            self._prefilling = None
        elif job in self._waiting:
            self._waiting.remove(job)

    def _answer(self, job: _Job, reason: FinishReason) -> None:
        if job.answer.done():
            return
        grain = self._world.grain
        # One that is not whole is sampled anew.
        entries = self._whole_entries(job) if reason == "abort" else math.ceil(job.wanted / grain)
        versions: list[int] = []
        for (_, version), (until, _) in itertools.pairwise([*job.versions, (math.inf, 0)]):
            last = entries if until == math.inf else min(entries, math.ceil(until / grain))
            versions += [version] * (last - len(versions))
        if self._timeline is not None:
            self._timeline.generated(
                job.script.number, self.name, job.began_s, tokens=job.sampled, versions=versions
            )
        job.answer.set_result(
            Completion(
                token_ids=[job.script.number] * entries,
                logprobs=[-1.0] * entries,
                versions=versions,
                temperature=job.sampling.temperature,
                finish_reason=reason,
                worker=self.name,
            )
        )

    def _show_load(self, timeline: Timeline) -> None:
        if len(self._decoding) != self._shown:
            self._shown = len(self._decoding)
            share = self._context / self._config.kv_tokens
            timeline.running(self.name, self._shown, share)
        works = not self._frozen and bool(self._decoding or self._prefilling)
        if works and self._works_since is None:
            self._works_since = self._loop.time()
        elif not works and self._works_since is not None:
            timeline.worker(self.name, "sample", self._works_since)
            self._works_since = None
