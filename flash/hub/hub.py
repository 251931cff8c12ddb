"""InferenceHub: the proxy between any number of agents and a pool of workers.

    generate ──► queue (FIFO) ──► the worker with room and the least outstanding tokens
        ▲                              │ failed? out of the pool, the request goes elsewhere
        └── tokens, logprobs, versions ┘ aborted by a publish? the rest is asked for again

A request waits here, not in a worker, until a worker has room; so each response is routed when it
can start, and nothing queues behind a long one. A publish takes the workers one after another.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from flash.errors import InferenceFailure, PublishFailure
from flash.hub.checks import check, check_age, check_gap
from flash.hub.http_worker import HttpWorker
from flash.hub.loan import Lent, Loan
from flash.hub.queue import RequestQueue
from flash.hub.reports import HubStats, PublishReport, WorkerPublish
from flash.hub.slot import Received, Slot
from flash.hub.supervisor import Supervisor
from flash.hub.worker import BadRequest, Pool, Worker, WorkerBroken, WorkerFailure
from flash.types import Completion, GenerateRequest, SamplingParams, UpdateMode, Weights

logger = logging.getLogger(__name__)

_ABORT_TIMEOUT_S = 10.0
# One request that no worker survives must not take them out in turn for ever, and workers that
# pass their health check and then answer nonsense (weights gone nan) must end the run.
_FAILURES_A_REQUEST = 5
_PROBE_PROMPT = (1, 2, 3, 1, 2, 3)  # any token ids that every vocabulary has
_PROBE_SAMPLING = SamplingParams(max_tokens=12)


class InferenceHub:
    """Answers `generate` from a pool of workers, and makes new weights their policy.

    >>> async with InferenceHub(["http://127.0.0.1:8000"]) as hub:
    ...     completion = await hub.generate(GenerateRequest(token_ids=[1, 2], sampling=sampling))

    Args:
        workers: URLs, Worker objects, or a Pool that starts its own.
        max_running: requests at one worker at a time.
        version: the policy version of the weights that the workers have now; they are told.
        weights: of that version, for workers that may have others: they get them before anything.
        request_timeout_s: for one answer; a worker that takes longer has failed.
        control_timeout_s: for a pause, a weight load, a health check.
        recovery_timeout_s: how long the pool may be without any healthy worker.
        progress_timeout_s: for the next tokens of any of its requests, at a worker that streams
            them; one that takes longer hangs.
        update_mode: what a publish does to the requests under way at a worker: `keep` freezes them
            and goes on with the new weights, `abort` ends them and samples the rest anew, `wait`
            lets them end first.
        gap_limit: by how much a worker's logprobs may differ from the trainer's after a publish.
            1e-3 holds for float32; bfloat16 on both sides needs about 0.1.

    Raises InferenceFailure from every call once no worker is left.
    """

    def __init__(
        self,
        workers: Sequence[str | Worker] | Pool,
        *,
        max_running: int = 64,
        version: int = 0,
        weights: Weights | None = None,
        request_timeout_s: float = 600.0,
        control_timeout_s: float = 300.0,
        recovery_timeout_s: float = 60.0,
        progress_timeout_s: float = 120.0,
        update_mode: UpdateMode = "keep",
        gap_limit: float = 1e-3,
    ) -> None:
        if isinstance(workers, str):
            raise ValueError(f"workers={workers!r} must be a list: [{workers!r}]")
        if isinstance(workers, Sequence) and not workers:
            raise ValueError("workers is empty: give at least one URL")
        if max_running < 1:
            raise ValueError(f"max_running={max_running} must be at least 1")
        if weights is not None and weights.version != version:
            raise ValueError(f"weights of version {weights.version} with version={version}")
        self.version = version
        self._given = workers
        self._pool = None if isinstance(workers, Sequence) else workers
        self._max_running = max_running
        self._request_timeout_s = request_timeout_s
        self._control_timeout_s = control_timeout_s
        self._update_mode = update_mode
        self._gap_limit = gap_limit
        self._tasks = asyncio.TaskGroup()
        self._slots: list[Slot] = []
        self._queue = RequestQueue(self._slots, max_running=max_running)
        self._supervisor = Supervisor(
            self._slots,
            self._queue,
            self._tasks,
            pool=self._pool,
            catch_up=self._catch_up,
            control_timeout_s=control_timeout_s,
            recovery_timeout_s=recovery_timeout_s,
            progress_timeout_s=progress_timeout_s,
        )
        self._published = {version}
        self._weights = weights
        self._publishing = asyncio.Lock()
        self._id = uuid.uuid4().hex[:8]
        self._request_ids = itertools.count()
        self._arrivals = itertools.count()
        self._prompt_tokens = self._generated_tokens = self._requests = self._retries = 0
        self._publishes = 0
        self._paused_s = 0.0

    async def __aenter__(self) -> "InferenceHub":
        """Starts a pool's workers, and tells every worker its version.

        One that does not answer is out until it does, so a server may start after the hub.
        """
        self._clock = asyncio.get_running_loop().time
        if isinstance(self._given, Sequence):
            workers = [HttpWorker(w) if isinstance(w, str) else w for w in self._given]
        else:
            workers = await self._given.start(self._supervisor.on_exit, self._supervisor.on_ready)
        self._slots += [Slot(worker, self.version) for worker in workers]
        for slot in self._slots:
            slot.up.set()
        await self._tasks.__aenter__()
        try:
            async with asyncio.TaskGroup() as greetings:
                for slot in self._slots:
                    greetings.create_task(
                        self._supervisor.greet(slot), name=f"greet {slot.worker.name}"
                    )
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._queue.close(InferenceFailure("the hub is closed"))
        self._supervisor.stop()
        async with contextlib.AsyncExitStack() as ends:  # each, whatever befalls another
            if self._pool is not None:
                ends.push_async_callback(self._pool.stop)
            for slot in self._slots:
                ends.push_async_callback(slot.worker.close)
            await self._tasks.__aexit__(None, None, None)

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    async def generate(
        self,
        request: GenerateRequest,
        on_start: Callable[[int], None] | None = None,
        on_sampled: Callable[[int], None] | None = None,
    ) -> Completion:
        """One response, from whichever worker is best, retried elsewhere if that one fails.

        `on_start` is called with the worker's policy version each time a worker begins: no token
        sampled from then on can be older. `on_sampled` is called with how many tokens it has so
        far, as far as workers tell before it is whole. Raises ValueError for a request that no
        worker takes, InferenceFailure if no worker is left or several failed at this very request.
        """
        if not request.token_ids or request.sampling.max_tokens < 1:
            raise ValueError(
                f"a request needs a prompt and max_tokens of at least 1, not "
                f"{len(request.token_ids)} tokens and max_tokens={request.sampling.max_tokens}"
            )
        arrival = next(self._arrivals)
        failures = 0
        token_ids: list[int] = []
        logprobs: list[float] = []
        versions: list[int] = []
        count = self._counting(on_sampled)
        while True:
            left = request.sampling.max_tokens - len(token_ids)
            sampling = replace(request.sampling, max_tokens=left)
            prompt = [*request.token_ids, *token_ids]
            cost = len(prompt) + sampling.max_tokens
            slot = await self._queue.acquire(request, cost=cost, arrival=arrival)
            received = Received(slot.version, len(token_ids), count)
            try:
                if not slot.accepting:  # something befell it in the moment it was given to us
                    continue
                self._supervisor.watch(slot)
                if on_start is not None:
                    on_start(received.version)
                piece = await self._ask(slot, prompt, sampling, received)
                check(piece, sampling, self._published)
                check_age(piece, slot, since=received.version)
                slot.failures = 0
            except WorkerFailure as failure:
                self._retries += 1
                failures += slot.healthy  # else it was taken out for another request's sake
                self._supervisor.take_out(slot, failure)
                if failures == _FAILURES_A_REQUEST and self._queue.failure is None:
                    raise InferenceFailure(
                        f"workers failed {failures} times at one request of {len(prompt)} tokens; "
                        f"the last time: {failure}"
                    ) from failure
                if isinstance(failure, WorkerBroken):
                    continue  # what it said before can't be believed either
                piece = received.as_aborted(slot.worker.name, sampling.temperature)
            except BadRequest as error:
                raise ValueError(str(error)) from error
            finally:
                self._queue.release(slot, cost=cost)
            token_ids += piece.token_ids
            logprobs += piece.logprobs
            versions += piece.versions
            count(len(token_ids))
            if piece.finish_reason == "abort" and len(token_ids) < request.sampling.max_tokens:
                continue
            self._requests += 1
            self._prompt_tokens += len(request.token_ids)
            reason = "length" if piece.finish_reason == "abort" else piece.finish_reason
            return Completion(
                token_ids=token_ids,
                logprobs=logprobs,
                versions=versions,
                temperature=request.sampling.temperature,
                finish_reason=reason,
                worker=slot.worker.name,
            )

    def _counting(self, on_sampled: Callable[[int], None] | None) -> Callable[[int], None]:
        """Takes how many tokens a response has so far; it has fewer if its worker fails."""
        counted = 0

        def count(sampled: int) -> None:
            nonlocal counted
            self._generated_tokens += max(0, sampled - counted)
            counted = max(counted, sampled)
            if on_sampled is not None:
                on_sampled(sampled)

        return count

    def forget(self, session: str) -> None:
        """No more requests of this session will come."""
        self._queue.forget(session)

    def stats(self) -> HubStats:
        """A snapshot."""
        return HubStats(
            version=self.version,
            queued=len(self._queue),
            running=sum(slot.running for slot in self._slots),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            requests=self._requests,
            retries=self._retries,
            publishes=self._publishes,
            paused_s=self._paused_s,
            workers=tuple(
                slot.stats(self._clock(), request_timeout_s=self._request_timeout_s)
                for slot in self._slots
            ),
        )

    def whereabouts(self, session: str) -> str:
        """Where the session's request is, or was last: `queue`, a worker's name, or nothing."""
        return self._queue.whereabouts(session)

    def give_up(self, worker: str, why: str) -> None:
        """Takes out a worker as one that hangs: its requests go elsewhere, a pool restarts it."""
        for slot in self._slots:
            if slot.worker.name == worker:
                self._supervisor.take_out(slot, WorkerBroken(f"{worker} is given up: {why}"))

    async def _ask(
        self, slot: Slot, prompt: Sequence[int], sampling: SamplingParams, received: Received
    ) -> Completion:
        def on_tokens(token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
            slot.streams = True
            slot.progress_at = self._clock()
            received.count(len(token_ids))
            if slot.version == received.version and not slot.updating:
                received.token_ids += token_ids
                received.logprobs += logprobs

        request_id = f"{self._id}-{next(self._request_ids)}"
        answered = False
        try:
            async with asyncio.timeout(self._request_timeout_s) as deadline:
                slot.deadlines[request_id] = deadline
                completion = await slot.worker.generate(request_id, prompt, sampling, on_tokens)
                slot.progress_at = self._clock()
                answered = True
                return completion
        except TimeoutError as error:
            if not slot.healthy:
                raise WorkerFailure(f"{slot.worker.name} was taken out meanwhile") from error
            raise WorkerFailure(
                f"{slot.worker.name} took longer than request_timeout_s="
                f"{self._request_timeout_s:g} for an answer"
            ) from error
        except (WorkerFailure, BadRequest):
            answered = True
            raise
        finally:
            del slot.deadlines[request_id]
            if not answered and not slot.gone and self._queue.failure is None:
                # Never in the way of the cancellation: its own task, with its own deadline.
                self._tasks.create_task(self._abort(slot, request_id), name=f"abort {request_id}")

    async def _abort(self, slot: Slot, request_id: str) -> None:
        try:
            async with asyncio.timeout(_ABORT_TIMEOUT_S):
                await slot.worker.abort(request_id)
        except (TimeoutError, WorkerFailure, BadRequest) as error:
            if slot.healthy:  # of one that is out, all of whose requests end, enough was said
                logger.warning("could not abort %s at %s: %s", request_id, slot.worker.name, error)

    # ── new weights ──────────────────────────────────────────────────────────────────────────

    async def publish(self, weights: Weights) -> PublishReport:
        """Make these weights the policy of every worker, one after another.

        A worker that fails meanwhile is taken out; it has the weights before it comes back.
        Raises ValueError for a version that is not newer, PublishFailure if a worker's logprobs
        of a probe differ from `weights.score` by more than `gap_limit`, or if the weights don't
        fit; InferenceFailure if no worker is left.
        """
        async with self._publishing:
            self._queue.raise_failure()
            if weights.version <= self.version:
                raise ValueError(
                    f"version {weights.version} is not newer than the published {self.version}"
                )
            self._published.add(weights.version)
            self._weights = weights
            paused_s: dict[Slot, float] = {}
            for slot in self._slots:
                # Not those that are out, nor one that came back with these weights just now.
                if slot.healthy and slot.lent is None and slot.version != weights.version:
                    started = self._clock()
                    await self._update(slot, weights, self._update_mode)
                    paused_s[slot] = self._clock() - started
            self._queue.raise_failure()
            self.version = weights.version
            gaps = await self._probe_all(weights)
            self._publishes += 1
            self._paused_s += sum(paused_s.values())
            per_worker = tuple(
                WorkerPublish(
                    name=slot.worker.name,
                    updated=slot.healthy and slot.version == weights.version,
                    paused_s=paused_s.get(slot, 0.0),
                    gap=gaps.get(slot, math.nan),
                )
                for slot in self._slots
            )
            return PublishReport(
                version=weights.version,
                gap_max=max(gaps.values(), default=math.nan),
                paused_s=sum(paused_s.values()),
                workers=sum(worker.updated for worker in per_worker),
                per_worker=per_worker,
            )

    @contextlib.asynccontextmanager
    async def lend(self, workers: int) -> AsyncIterator["InferenceHub"]:
        """A hub over so many of the workers, while the block runs, with the weights they have now.

        This hub sends them nothing and publishes nothing to them meanwhile; what they were at,
        they finish. Afterwards they get the present weights and come back. One that fails is lost
        to the borrower, and back here once it is well. Raises InferenceFailure if there are not
        enough healthy workers to keep one.
        """
        async with self._publishing:  # not between two versions
            able = [s for s in self._slots if s.accepting and s.version == self.version]
            if len(able) <= workers:
                raise InferenceFailure(
                    f"{workers} of {len(able)} healthy workers can't be lent: one must stay"
                )
            slots = sorted(able, key=lambda slot: slot.outstanding_tokens)[:workers]
            lent = [Lent(slot.worker) for slot in slots]
            for slot, worker in zip(slots, lent, strict=True):
                slot.lent = worker
            share = InferenceHub(
                Loan(lent),
                max_running=self._max_running,
                version=self.version,
                request_timeout_s=self._request_timeout_s,
                control_timeout_s=self._control_timeout_s,
                recovery_timeout_s=self._supervisor.recovery_timeout_s,
                progress_timeout_s=self._supervisor.progress_timeout_s,
            )
        try:
            async with share:
                yield share
        finally:
            told = share.stats()
            self._requests += told.requests
            self._prompt_tokens += told.prompt_tokens
            self._generated_tokens += told.generated_tokens
            for slot in slots:
                rejoin = self._rejoin(slot)
                self._tasks.create_task(rejoin, name=f"rejoin {slot.worker.name}")

    async def _rejoin(self, slot: Slot) -> None:
        """A lent worker comes back, with the present weights."""
        async with self._publishing:
            lent, slot.lent = slot.lent, None
            assert lent is not None
            slot.busy_s += lent.busy_s
            if lent.failed and slot.healthy:
                self._supervisor.take_out(slot, WorkerFailure(f"{slot.worker.name}: {lent.failed}"))
            if slot.healthy and self._weights is not None and slot.version != self.version:
                try:
                    await self._update(slot, self._weights, "keep")
                except PublishFailure as failure:
                    logger.warning("%s came back from an evaluation: %s", slot.worker.name, failure)
        self._queue.dispatch()

    async def probe(self, weights: Weights) -> float:
        """The largest difference between the workers' logprobs and `weights.score`, on a probe.

        For weights that the workers have already (at the start of a run). Raises PublishFailure
        above `gap_limit`; nan if `weights.score` is None or no worker is healthy.
        """
        async with self._publishing:
            return max((await self._probe_all(weights)).values(), default=math.nan)

    async def _update(self, slot: Slot, weights: Weights, mode: UpdateMode) -> None:
        """One worker's turn in a publish. Afterwards it has the weights, or is taken out."""
        timeout_s = self._control_timeout_s
        if mode == "wait":  # for the requests that it has, as long as each may take
            timeout_s += self._request_timeout_s
        slot.updating = True
        try:
            async with slot.control(timeout_s):
                await self._replace_weights(slot, weights, mode)
        except WorkerFailure as failure:
            self._supervisor.take_out(slot, failure)
        except BadRequest as error:
            self._supervisor.take_out(slot, WorkerFailure(str(error)))
            raise PublishFailure(f"version {weights.version}: {error}") from error
        except asyncio.CancelledError:
            # It may be paused, or between two weights.
            self._supervisor.take_out(
                slot, WorkerFailure(f"{slot.worker.name}: its publish was cancelled")
            )
            raise
        finally:
            slot.updating = False
            self._queue.dispatch()

    async def _catch_up(self, slot: Slot) -> None:
        """Gives a worker the present weights and version, and leaves it going.

        A publish does not wait for this, and passes over workers that are out; so what is present
        may change meanwhile. The weights are not probed: `score` speaks for the trainer as it is
        now, which may be a step ahead of them.
        """
        while True:
            weights = self._weights
            if weights is not None:
                await self._replace_weights(slot, weights, "abort")
            else:
                await slot.worker.set_version(self.version)
                await slot.worker.resume()  # a run that was killed may have left it paused
            if weights is self._weights:
                return

    async def _replace_weights(self, slot: Slot, weights: Weights, mode: UpdateMode) -> None:
        await slot.worker.pause(mode)
        await slot.worker.load_weights(weights.path)
        await slot.worker.set_version(weights.version)
        slot.version = weights.version
        await slot.worker.resume()

    async def _probe_all(self, weights: Weights) -> dict[Slot, float]:
        """The gap of each worker that could be asked; of none without a `score`."""
        gaps: dict[Slot, float] = {}
        for slot in self._slots if weights.score is not None else ():
            if not slot.healthy or slot.version != weights.version:
                continue
            try:
                received = Received(weights.version)
                piece = await self._ask(slot, _PROBE_PROMPT, _PROBE_SAMPLING, received)
                check(piece, _PROBE_SAMPLING, self._published)
                if not piece.token_ids:
                    raise WorkerFailure(f"{slot.worker.name} aborted the probe")
            except WorkerFailure as failure:
                self._supervisor.take_out(slot, failure)
                continue
            except BadRequest as error:
                raise PublishFailure(f"{slot.worker.name} refused the probe: {error}") from error
            assert weights.score is not None
            expected = await weights.score([*_PROBE_PROMPT, *piece.token_ids])
            gaps[slot] = check_gap(
                piece,
                expected[len(_PROBE_PROMPT) - 1 :],
                version=weights.version,
                limit=self._gap_limit,
            )
        return gaps
