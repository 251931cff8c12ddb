"""InferenceHub: the proxy between any number of agents and a pool of workers.

    generate ──► queue (FIFO) ──► the worker with room and the least outstanding tokens
        ▲                              │ failed? out of the pool, the request goes elsewhere
        └── tokens, logprobs, versions ┘ aborted by a publish? the rest is asked for again

A request waits here, not in a worker, until a worker has room; so each response is routed when it
can start, and nothing queues behind a long one. A publish takes the workers one after another.
"""

import asyncio
import bisect
import contextlib
import itertools
import logging
import math
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace

from flash.errors import InferenceFailure, PublishFailure
from flash.hub.checks import check, check_age
from flash.hub.http_worker import HttpWorker
from flash.hub.loan import Lent, Loan
from flash.hub.reports import HubStats, PublishReport, WorkerPublish, WorkerStats
from flash.hub.slot import Received, Slot, Waiter
from flash.hub.worker import BadRequest, Pool, Worker, WorkerBroken, WorkerFailure
from flash.types import Completion, GenerateRequest, SamplingParams, UpdateMode, Weights

logger = logging.getLogger(__name__)

_SESSIONS_KEPT = 100_000  # routing hints only: losing one costs a prefill
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 8.0
# How much busier the worker with the prefix may be. A request more slows a batch by a little, a
# prefix costs its whole prefill; with these, agents of 20 turns find nine tenths of theirs.
_HOME_SHARE, _HOME_MORE = 1.25, 4
_ABORT_TIMEOUT_S = 10.0
_HEALTH_TIMEOUT_S = 10.0
_UNWELL_UNTIL_RESTART = 3  # health checks that fail in a row
# One request that no worker survives must not take them out in turn for ever, and workers that
# pass their health check and then answer nonsense (weights gone nan) must end the run.
_FAILURES_A_REQUEST = 5
# Each costs about 0.2 ms until its answer is read: a burst of thousands must not hold the loop.
_PLACES_A_TURN = 16
_CONTROL = "control"  # where a request has its id; a worker has one such call at a time
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
        request_timeout_s: for one answer; a worker that takes longer has failed.
        control_timeout_s: for a pause, a weight load, a health check.
        recovery_timeout_s: how long the pool may be without any healthy worker.
        progress_timeout_s: for the next tokens of any of its requests, at a worker that streams
            them; one that takes longer hangs.
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
        request_timeout_s: float = 600.0,
        control_timeout_s: float = 300.0,
        recovery_timeout_s: float = 60.0,
        progress_timeout_s: float = 120.0,
        gap_limit: float = 1e-3,
    ) -> None:
        if isinstance(workers, str):
            raise ValueError(f"workers={workers!r} must be a list: [{workers!r}]")
        if isinstance(workers, Sequence) and not workers:
            raise ValueError("workers is empty: give at least one URL")
        if max_running < 1:
            raise ValueError(f"max_running={max_running} must be at least 1")
        self.version = version
        self._given = workers
        self._max_running = max_running
        self._request_timeout_s = request_timeout_s
        self._control_timeout_s = control_timeout_s
        self._recovery_timeout_s = recovery_timeout_s
        self._progress_timeout_s = progress_timeout_s
        self._gap_limit = gap_limit
        self._slots: list[Slot] = []
        # By arrival. Bound: one entry for each caller; the agents are bounded by their loop.
        self._queue: deque[Waiter] = deque()
        self._given_this_turn = 0
        self._sessions: OrderedDict[str, Slot] = OrderedDict()
        self._published = {version}
        self._weights: Weights | None = None
        self._publishing = asyncio.Lock()
        self._last_hope: asyncio.TimerHandle | None = None  # runs while no worker is healthy
        self._failure: InferenceFailure | None = None
        self._tasks = asyncio.TaskGroup()
        self._recoveries: set[asyncio.Task[None]] = set()
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
            workers = await self._given.start(self._on_exit, self._on_ready)
        self._slots = [Slot(worker, self.version) for worker in workers]
        for slot in self._slots:
            slot.up.set()
        await self._tasks.__aenter__()
        try:
            async with asyncio.TaskGroup() as greetings:
                for slot in self._slots:
                    greetings.create_task(self._greet(slot), name=f"greet {slot.worker.name}")
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._tell_all(InferenceFailure("the hub is closed"))
        for slot in self._slots:
            self._send_away(slot)
            if slot.progress_timer is not None:
                slot.progress_timer.cancel()
        for task in self._recoveries:
            task.cancel()
        try:
            await self._tasks.__aexit__(None, None, None)
        finally:
            for slot in self._slots:
                await slot.worker.close()
            if not isinstance(self._given, Sequence):
                await self._given.stop()

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    async def generate(
        self, request: GenerateRequest, on_start: Callable[[int], None] | None = None
    ) -> Completion:
        """One response, from whichever worker is best, retried elsewhere if that one fails.

        `on_start` is called with the worker's policy version each time a worker begins: no token
        sampled from then on can be older. Raises ValueError for a request that no worker takes,
        InferenceFailure if no worker is left or several failed at this very request.
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
        while True:
            sampling = request.sampling
            if token_ids:
                sampling = replace(sampling, max_tokens=sampling.max_tokens - len(token_ids))
            prompt = [*request.token_ids, *token_ids]
            cost = len(prompt) + sampling.max_tokens
            slot = await self._acquire(request, cost=cost, arrival=arrival)
            received = Received(slot.version)
            try:
                if not slot.accepting:  # something befell it in the moment it was given to us
                    continue
                if on_start is not None:
                    on_start(received.version)
                piece = await self._ask(slot, prompt, sampling, received)
                check(piece, sampling, self._published)
                check_age(piece, slot, since=received.version)
                slot.failures = 0
            except WorkerFailure as failure:
                self._retries += 1
                failures += slot.healthy  # else it was taken out for another request's sake
                self._take_out(slot, failure)
                if failures == _FAILURES_A_REQUEST and self._failure is None:
                    raise InferenceFailure(
                        f"workers failed {failures} times at one request of {len(prompt)} tokens; "
                        f"the last time: {failure}"
                    ) from failure
                if isinstance(failure, WorkerBroken):
                    continue  # what it said before can't be believed either
                piece = received.as_aborted(slot.worker.name)
            except BadRequest as error:
                raise ValueError(str(error)) from error
            finally:
                self._release(slot, cost=cost)
            token_ids += piece.token_ids
            logprobs += piece.logprobs
            versions += piece.versions
            if piece.finish_reason == "abort" and len(token_ids) < request.sampling.max_tokens:
                continue
            self._requests += 1
            self._prompt_tokens += len(request.token_ids)
            self._generated_tokens += len(token_ids)
            reason = "length" if piece.finish_reason == "abort" else piece.finish_reason
            return Completion(
                token_ids=token_ids,
                logprobs=logprobs,
                versions=versions,
                finish_reason=reason,
                worker=slot.worker.name,
            )

    def forget(self, session: str) -> None:
        """No more requests of this session will come."""
        self._sessions.pop(session, None)

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
                WorkerStats(
                    name=slot.worker.name,
                    healthy=slot.healthy,
                    version=slot.version,
                    running=slot.running,
                    outstanding_tokens=slot.outstanding_tokens,
                    busy_s=slot.busy_s
                    + (slot.lent.busy_s if slot.lent is not None else 0.0)
                    + (self._clock() - slot.busy_since) * (slot.running > 0),
                    updating=slot.updating,
                    lent=slot.lent is not None,
                    quiet_s=(self._clock() - slot.progress_at) * (slot.running > 0),
                    oldest_s=max(ages_s, default=0.0),
                    newest_s=min(ages_s, default=0.0),
                )
                for slot, ages_s in ((slot, self._request_ages_s(slot)) for slot in self._slots)
            ),
        )

    def whereabouts(self, session: str) -> str:
        """Where the session's request is, or was last: `queue`, a worker's name, or nothing."""
        if any(waiter.request.session == session for waiter in self._queue):
            return "queue"
        slot = self._sessions.get(session)
        return slot.worker.name if slot is not None else ""

    def give_up(self, worker: str, why: str) -> None:
        """Takes out a worker as one that hangs: its requests go elsewhere, a pool restarts it."""
        for slot in self._slots:
            if slot.worker.name == worker:
                self._take_out(slot, WorkerBroken(f"{worker} is given up: {why}"))

    def _request_ages_s(self, slot: Slot) -> list[float]:
        """Of those under way at a worker, oldest first."""
        now, timeout_s = self._clock(), self._request_timeout_s
        due = [deadline.when() for key, deadline in slot.deadlines.items() if key != _CONTROL]
        return [now - (when - timeout_s) for when in due if when is not None]

    async def _acquire(self, request: GenerateRequest, *, cost: int, arrival: int) -> Slot:
        """Waits for a place at a worker; `_release` gives it back."""
        if self._failure is not None:
            raise self._failed()
        waiter = Waiter(arrival, request, cost, asyncio.get_running_loop().create_future())
        if self._queue and self._queue[-1].arrival > arrival:  # it lost its worker
            bisect.insort(self._queue, waiter, key=lambda other: other.arrival)
        else:
            self._queue.append(waiter)
        self._dispatch()
        try:
            return await waiter.slot
        except asyncio.CancelledError:
            if waiter in self._queue:
                self._queue.remove(waiter)
            elif not waiter.slot.cancelled() and waiter.slot.exception() is None:
                self._release(waiter.slot.result(), cost=cost)
            raise

    def _dispatch(self) -> None:
        """Gives places to those that wait, first come first served, a few in a turn of the loop."""
        passed = 0  # they wait for a worker of their own
        while passed < len(self._queue) and self._given_this_turn < _PLACES_A_TURN:
            waiter = self._queue[passed]
            if waiter.slot.done():  # its caller was cancelled
                del self._queue[passed]
                continue
            slot = self._best(waiter.request)
            if slot is None:
                if self._place_of(waiter.request) is None:
                    return
                passed += 1
                continue
            if self._given_this_turn == 0:
                asyncio.get_running_loop().call_soon(self._next_turn)
            self._given_this_turn += 1
            del self._queue[passed]
            if slot.running == 0:
                slot.busy_since = slot.progress_at = self._clock()
                if slot.progress_timer is None:
                    self._look_later(slot)
            slot.running += 1
            slot.outstanding_tokens += waiter.cost
            for session in (waiter.request.session, waiter.request.place):
                if session:
                    self._sessions[session] = slot
                    self._sessions.move_to_end(session)
                    if len(self._sessions) > _SESSIONS_KEPT:
                        self._sessions.popitem(last=False)
            waiter.slot.set_result(slot)

    def _next_turn(self) -> None:
        self._given_this_turn = 0
        self._dispatch()

    def _best(self, request: GenerateRequest) -> Slot | None:
        """The worker that has the prefix, unless it is much busier; else the least loaded."""
        if (place := self._place_of(request)) is not None:
            return place if place.running < self._max_running else None
        least: Slot | None = None
        for slot in self._slots:  # a plain loop: hundreds of workers are asked for each request
            if slot.running == self._max_running or not slot.accepting:
                continue
            if least is None or slot.outstanding_tokens < least.outstanding_tokens:
                least = slot
        home = self._sessions.get(request.session)
        if least is None or home is None or home is least:
            return least
        if home.running == self._max_running or not home.accepting:
            return least
        return home if home.running <= _HOME_SHARE * least.running + _HOME_MORE else least

    def _place_of(self, request: GenerateRequest) -> Slot | None:
        """The worker that the request must go to, as long as that takes any."""
        place = self._sessions.get(request.place) if request.place else None
        return place if place is not None and place.accepting else None

    def _release(self, slot: Slot, *, cost: int) -> None:
        slot.running -= 1
        slot.outstanding_tokens -= cost
        if slot.running == 0:
            slot.busy_s += self._clock() - slot.busy_since
        self._dispatch()

    async def _ask(
        self, slot: Slot, prompt: Sequence[int], sampling: SamplingParams, received: Received
    ) -> Completion:
        def on_tokens(token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
            slot.streams = True
            slot.progress_at = self._clock()
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
            if not answered and not slot.gone and self._failure is None:
                # Never in the way of the cancellation: its own task, with its own deadline.
                self._tasks.create_task(self._abort(slot, request_id), name=f"abort {request_id}")

    async def _abort(self, slot: Slot, request_id: str) -> None:
        try:
            async with asyncio.timeout(_ABORT_TIMEOUT_S):
                await slot.worker.abort(request_id)
        except (TimeoutError, WorkerFailure, BadRequest) as error:
            logger.warning("could not abort %s at %s: %s", request_id, slot.worker.name, error)

    # ── workers that fail and return ─────────────────────────────────────────────────────────

    def _on_exit(self, worker: Worker, why: str, final: bool) -> None:
        """A worker's process died; unless that was final, the pool starts it anew."""
        for slot in self._slots:
            if slot.worker is worker:
                slot.gone = final
                if final:
                    slot.up.set()  # nobody need wait for it any more
                else:
                    slot.up.clear()
                self._take_out(slot, WorkerFailure(why))

    def _on_ready(self, worker: Worker) -> None:
        """A worker's process lives again, with its first weights."""
        for slot in self._slots:
            if slot.worker is worker:
                slot.up.set()

    def _restart(self, slot: Slot) -> None:
        """If it is ours to do."""
        if not isinstance(self._given, Sequence) and slot.up.is_set() and not slot.gone:
            logger.warning("worker %s is started anew", slot.worker.name)
            slot.up.clear()
            self._given.restart(slot.worker)

    def _look_later(self, slot: Slot) -> None:
        due = slot.progress_at + self._progress_timeout_s
        slot.progress_timer = asyncio.get_running_loop().call_at(due, self._look, slot)

    def _look(self, slot: Slot) -> None:
        """Takes a worker out that has requests, streams tokens, and brought none for too long."""
        slot.progress_timer = None
        if slot.running == 0 or not slot.healthy:
            return  # the next request looks again
        if slot.updating or not slot.streams:
            slot.progress_at = self._clock()  # a freeze has a deadline of its own
        if self._clock() < slot.progress_at + self._progress_timeout_s:
            self._look_later(slot)
            return
        hangs = WorkerBroken(
            f"{slot.worker.name} hangs: {slot.running} requests and no token for "
            f"progress_timeout_s={self._progress_timeout_s:g}"
        )
        self._take_out(slot, hangs)

    def _take_out(self, slot: Slot, cause: WorkerFailure) -> None:
        """No more requests for this worker, and those it has go elsewhere, until it is healthy."""
        if not slot.healthy and not slot.gone:
            return  # it is known, and being looked after
        was_healthy, slot.healthy = slot.healthy, False
        if slot.lent is not None:  # what comes back has other weights
            slot.lent.end(str(cause))
        self._send_away(slot)
        if self._failure is not None:
            return
        if isinstance(cause, WorkerBroken):
            self._restart(slot)
        if was_healthy:
            logger.warning("worker taken out: %s", cause)
        if all(other.gone for other in self._slots):
            self._fail(cause)
            return
        if self._last_hope is None and not any(other.healthy for other in self._slots):
            self._last_hope = asyncio.get_running_loop().call_later(
                self._recovery_timeout_s, self._fail, cause
            )
        if was_healthy:
            recovery = self._tasks.create_task(
                self._recover(slot), name=f"recover {slot.worker.name}"
            )
            self._recoveries.add(recovery)
            recovery.add_done_callback(self._recoveries.discard)

    def _send_away(self, slot: Slot) -> None:
        """The requests that this worker has end now, as if they had taken too long."""
        for deadline in slot.deadlines.values():
            if not deadline.expired():
                deadline.reschedule(self._clock())

    async def _greet(self, slot: Slot) -> None:
        """Tells a worker its version at the start of the hub."""
        try:
            async with self._deadline(slot, self._control_timeout_s):
                await self._catch_up(slot)
        except WorkerFailure as failure:
            self._take_out(slot, failure)
        except BadRequest as error:
            self._take_out(slot, WorkerFailure(str(error)))

    async def _recover(self, slot: Slot) -> None:
        """Asks for its health until it is well, then gives it the present weights."""
        unwell = 0
        while self._failure is None:
            await slot.up.wait()
            if slot.gone:
                return
            # A worker that fails again before it has answered anything waits longer.
            await asyncio.sleep(min(_FIRST_BACKOFF_S * 2**slot.failures, _LONGEST_BACKOFF_S))
            slot.failures = min(slot.failures + 1, 10)
            try:
                async with self._deadline(slot, _HEALTH_TIMEOUT_S):
                    await slot.worker.check_health()
                async with self._deadline(slot, self._control_timeout_s):
                    await self._catch_up(slot)
                    slot.healthy = slot.up.is_set() and not slot.gone and self._failure is None
            except (WorkerFailure, BadRequest) as error:
                logger.warning("%s is not well yet: %s", slot.worker.name, error)
                unwell += 1
                if unwell % _UNWELL_UNTIL_RESTART == 0:
                    self._restart(slot)
            if slot.healthy:
                logger.warning("worker %s is back", slot.worker.name)
                if self._last_hope is not None:
                    self._last_hope.cancel()
                    self._last_hope = None
                self._dispatch()
                return

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

    @contextlib.asynccontextmanager
    async def _deadline(self, slot: Slot, timeout_s: float) -> AsyncIterator[None]:
        """Ends what is done to a worker with WorkerFailure: in time, or when it is taken out."""
        try:
            async with asyncio.timeout(timeout_s) as deadline:
                slot.deadlines[_CONTROL] = deadline
                try:
                    yield
                finally:
                    del slot.deadlines[_CONTROL]
        except TimeoutError as error:
            raise WorkerFailure(
                f"{slot.worker.name} was taken out, or took longer than {timeout_s:g} s for a "
                f"pause, a weight load or a health check"
            ) from error

    def _fail(self, cause: WorkerFailure) -> None:
        """The pool has nobody left."""
        failure = InferenceFailure(f"no inference worker is left; the last one: {cause}")
        failure.__cause__ = cause
        self._tell_all(failure)

    def _tell_all(self, failure: InferenceFailure) -> None:
        """Every caller gets this failure, now and later; the first one is the cause and stays."""
        if self._last_hope is not None:
            self._last_hope.cancel()
        self._failure = self._failure or failure
        for waiter in self._queue:
            if not waiter.slot.done():
                waiter.slot.set_exception(self._failed())
        self._queue.clear()

    def _failed(self) -> InferenceFailure:
        """The failure for one caller: an error that many raise would grow their tracebacks."""
        assert self._failure is not None
        failure = InferenceFailure(str(self._failure))
        failure.__cause__ = self._failure.__cause__
        return failure

    # ── new weights ──────────────────────────────────────────────────────────────────────────

    async def publish(self, weights: Weights, mode: UpdateMode = "keep") -> PublishReport:
        """Make these weights the policy of every worker, one after another.

        mode: what happens to requests under way at a worker: `keep` freezes them and goes on with
        the new weights, `abort` ends them and samples the rest anew, `wait` lets them end first.
        A worker that fails meanwhile is taken out; it has the weights before it comes back.
        Raises ValueError for a version that is not newer, PublishFailure if a worker's logprobs
        of a probe differ from `weights.score` by more than `gap_limit`, or if the weights don't
        fit; InferenceFailure if no worker is left.
        """
        async with self._publishing:
            if self._failure is not None:
                raise self._failed()
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
                    await self._update(slot, weights, mode)
                    paused_s[slot] = self._clock() - started
            if self._failure is not None:
                raise self._failed()
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
                recovery_timeout_s=self._recovery_timeout_s,
                progress_timeout_s=self._progress_timeout_s,
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
                self._take_out(slot, WorkerFailure(f"{slot.worker.name}: {lent.failed}"))
            if slot.healthy and self._weights is not None and slot.version != self.version:
                try:
                    await self._update(slot, self._weights, "keep")
                except PublishFailure as failure:
                    logger.warning("%s came back from an evaluation: %s", slot.worker.name, failure)
        self._dispatch()

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
            async with self._deadline(slot, timeout_s):
                await self._replace_weights(slot, weights, mode)
        except WorkerFailure as failure:
            self._take_out(slot, failure)
        except BadRequest as error:
            self._take_out(slot, WorkerFailure(str(error)))
            raise PublishFailure(f"version {weights.version}: {error}") from error
        except asyncio.CancelledError:
            # It may be paused, or between two weights.
            self._take_out(slot, WorkerFailure(f"{slot.worker.name}: its publish was cancelled"))
            raise
        finally:
            slot.updating = False
            self._dispatch()

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
                self._take_out(slot, failure)
                continue
            except BadRequest as error:
                raise PublishFailure(f"{slot.worker.name} refused the probe: {error}") from error
            assert weights.score is not None
            expected = await weights.score([*_PROBE_PROMPT, *piece.token_ids])
            expected = expected[len(_PROBE_PROMPT) - 1 :]
            differences = [abs(a - b) for a, b in zip(piece.logprobs, expected, strict=True)]
            # max() alone would pass over a nan.
            gap = max(differences) if all(map(math.isfinite, differences)) else math.nan
            if set(piece.versions) != {weights.version} or not gap <= self._gap_limit:
                raise PublishFailure(
                    f"{slot.worker.name} should sample with version {weights.version}: it says "
                    f"{sorted(set(piece.versions))}, and its logprobs differ from the trainer's by "
                    f"{gap:.2g}, more than engine.gap_limit={self._gap_limit:g}. Either it has "
                    f"other weights, or the two compute in precisions that need a higher limit"
                )
            gaps[slot] = gap
        return gaps
