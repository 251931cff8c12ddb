"""InferenceHub: the proxy between any number of agents and a pool of workers.

    generate ──► queue (FIFO) ──► the worker with room and the least outstanding tokens
        ▲                              │ failed? excluded, and the request goes elsewhere
        └── tokens, logprobs, versions ┘ aborted by a publish? the rest is asked for again

A request waits here, not in a worker, until a worker has room; so each response is routed when it
can start, and nothing queues behind a long one. A publish takes half of the workers at a time.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence

from flash.errors import InferenceFailure
from flash.hub.attempts import Attempts
from flash.hub.checks import check_age, check_completion
from flash.hub.http_worker import HttpWorker
from flash.hub.policy import Policy
from flash.hub.probe import Gap, Probe
from flash.hub.publisher import Publisher
from flash.hub.queue import RequestQueue
from flash.hub.reports import HubStats, PublishReport
from flash.hub.response import Response
from flash.hub.slot import Slot
from flash.hub.supervisor import Supervisor
from flash.hub.turns import MakeRoom, Turns
from flash.hub.worker import BadRequest, Pool, Worker, WorkerBroken, WorkerFailure
from flash.types import Completion, GenerateRequest, UpdateMode, Weights

# One request that no worker survives must not exclude them in turn for ever, and workers that
# pass their health check and then answer nonsense (weights gone nan) must end the run.
_FAILURES_A_REQUEST = 5


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
            and goes on with the new weights, with keys and values computed anew; `keep_stale_kv`
            with those of the old weights, so that their next tokens are of a mixture; `abort` ends
            them and samples the rest anew, `wait` lets them end first.
        make_room: for workers that share their GPUs with the trainer: awaited before they start and
            before they wake, so that the trainer gives these away; see `asleep`.
        probe: what a worker is asked after a publish, and how far from the trainer it may be; its
            default is for float32 on both sides.

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
        make_room: MakeRoom | None = None,
        probe: Probe = Probe(),  # noqa: B008 (it is frozen)
    ) -> None:
        if isinstance(workers, str):
            raise ValueError(f"workers={workers!r} must be a list: [{workers!r}]")
        if isinstance(workers, Sequence) and not workers:
            raise ValueError("workers is empty: give at least one URL")
        if max_running < 1:
            raise ValueError(f"max_running={max_running} must be at least 1")
        if weights is not None and weights.version != version:
            raise ValueError(
                f"weights of version {weights.version} with version={version}: make them the same"
            )
        self._given = workers
        self._pool = None if isinstance(workers, Sequence) else workers
        self._max_running = max_running
        self._request_timeout_s = request_timeout_s
        self._control_timeout_s = control_timeout_s
        self._tasks = asyncio.TaskGroup()
        self._slots: list[Slot] = []
        self._queue = RequestQueue(self._slots, max_running=max_running)
        self._policy = Policy(version, weights)
        self._supervisor = Supervisor(
            self._slots,
            self._queue,
            self._tasks,
            pool=self._pool,
            catch_up=self._policy.catch_up,
            control_timeout_s=control_timeout_s,
            recovery_timeout_s=recovery_timeout_s,
            progress_timeout_s=progress_timeout_s,
        )
        self._make_room = make_room or _nothing
        self._turns = Turns(
            self._slots,
            self._queue,
            self._policy,
            self._supervisor,
            make_room=self._make_room,
            update_mode=update_mode,
            control_timeout_s=control_timeout_s,
            request_timeout_s=request_timeout_s,
        )
        self._attempts = Attempts(self._queue, self._tasks, request_timeout_s=request_timeout_s)
        self._publisher = Publisher(
            self._slots,
            self._queue,
            self._policy,
            self._tasks,
            turns=self._turns,
            ask=self._attempts.ask,
            exclude=self._supervisor.exclude,
            update_mode=update_mode,
            control_timeout_s=control_timeout_s,
            request_timeout_s=request_timeout_s,
            probe=probe,
        )
        self._arrivals = itertools.count()
        self._prompt_tokens = self._generated_tokens = self._requests = self._retries = 0
        self._publishes = self._mixed_tokens = 0
        self._paused_s = self._load_s = self._reset_s = 0.0

    async def __aenter__(self) -> "InferenceHub":
        """Starts a pool's workers, and tells every worker its version.

        One that does not answer is excluded until it does: a server may start after the hub.
        """
        self._clock = asyncio.get_running_loop().time
        await self._make_room()
        if isinstance(self._given, Sequence):
            workers = [HttpWorker(w) if isinstance(w, str) else w for w in self._given]
        else:
            workers = await self._given.start(self._supervisor.on_exit, self._supervisor.on_ready)
        self._slots += [Slot(worker, self.version) for worker in workers]
        await self._tasks.__aenter__()
        try:
            async with asyncio.TaskGroup() as introductions:
                for slot in self._slots:
                    introductions.create_task(
                        self._supervisor.introduce(slot), name=f"introduce {slot.worker.name}"
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

    @property
    def version(self) -> int:
        """The policy version that was published last."""
        return self._policy.version

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
        if request.sampling.constraint is not None and not self.constrains:
            raise ValueError(
                "not all workers here can hold what they sample to a constraint (vLLM's can)"
            )
        arrival = next(self._arrivals)
        response = Response(request, on_new=self._count_tokens, on_sampled=on_sampled)
        failures = 0
        while True:
            prompt, sampling = response.rest()
            cost = len(prompt) + sampling.max_tokens
            slot = await self._queue.acquire(request, cost=cost, arrival=arrival)
            partial = response.begin(slot.version)
            try:
                if not slot.accepting:  # something befell it in the moment it was given to us
                    continue
                self._supervisor.watch_progress(slot)
                if on_start is not None:
                    on_start(partial.version)
                part = await self._attempts.ask(slot, prompt, sampling, partial)
                check_completion(part, prompt, sampling, self._policy.published)
                check_age(part, slot, since=partial.version)
                slot.failures = 0
                if self._publisher.update_mode == "keep_stale_kv":
                    self._mixed_tokens += sum(v != partial.version for v in part.versions)
            except WorkerFailure as failure:
                self._retries += 1
                failures += slot.healthy  # else it was excluded for another request's sake
                self._supervisor.exclude(slot, failure)
                if failures == _FAILURES_A_REQUEST and self._queue.failure is None:
                    raise InferenceFailure(
                        f"workers failed {failures} times at one request of {len(prompt)} tokens; "
                        f"the last time: {failure}"
                    ) from failure
                if isinstance(failure, WorkerBroken):
                    continue  # what it said before can't be believed either
                part = partial.as_aborted(slot.worker.name)
            except BadRequest as error:
                raise ValueError(str(error)) from error
            finally:
                self._queue.release(slot, cost=cost)
            completion = response.add(part, worker=slot.worker.name)
            if completion is not None:
                self._requests += 1
                self._prompt_tokens += len(request.token_ids)
                return completion

    def _count_tokens(self, new: int) -> None:
        self._generated_tokens += new

    def forget(self, session: str) -> None:
        """No more requests of this session will come."""
        self._queue.forget(session)

    @property
    def constrains(self) -> bool:
        """Whether its workers keep a response to `SamplingParams.constraint`, all of them."""
        return all(slot.worker.constrains for slot in self._slots)

    @property
    def room(self) -> int:
        """So many more requests its workers could have in hand; below 0 where some wait."""
        free = (self._max_running - slot.running for slot in self._slots if slot.accepting)
        return sum(free) - len(self._queue)

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
            load_s=self._load_s,
            reset_s=self._reset_s,
            mixed_tokens=self._mixed_tokens,
            workers=tuple(
                slot.stats(self._clock(), request_timeout_s=self._request_timeout_s)
                for slot in self._slots
            ),
        )

    def whereabouts(self, session: str) -> str:
        """Where the session's request is, or was last: `queue`, a worker's name, or nothing."""
        return self._queue.whereabouts(session)

    def give_up(self, worker: str, why: str) -> None:
        """Excludes a worker as one that hangs: its requests go elsewhere, a pool restarts it."""
        for slot in self._slots:
            if slot.worker.name == worker:
                self._supervisor.exclude(slot, WorkerBroken(f"{worker} is given up: {why}"))

    # ── new weights ──────────────────────────────────────────────────────────────────────────

    async def publish(self, weights: Weights) -> PublishReport:
        """Make these weights the policy of every worker, half of them at a time.

        A worker that fails meanwhile is excluded; it has the weights before it comes back. Raises
        ValueError for a version that is not newer, PublishFailure if a worker is farther from
        `weights.score` than the probe allows, or if the weights don't fit; InferenceFailure if no
        worker is left.
        """
        report = await self._publisher.publish(weights)
        self._publishes += 1
        self._paused_s += report.paused_s
        self._load_s += report.load_s
        self._reset_s += report.reset_s
        return report

    async def probe(self, weights: Weights, probe: Probe | None = None) -> Gap | None:
        """How far the workers are from `weights.score`, by the hub's own probe or another.

        For weights that the workers have already (at the start of a run). Raises PublishFailure
        above the limit; None if `weights.score` is None or no worker is healthy.
        """
        return await self._publisher.probe(weights, probe)

    @contextlib.asynccontextmanager
    async def asleep(self) -> AsyncIterator[None]:
        """The GPUs are the trainer's while the block runs, or until it publishes.

        Workers sleep, and what they were asked waits with them, for as long as it takes: requests
        have no deadline meanwhile. They wake with the present weights. Blocks may be nested: the
        outermost one ends their sleep. One that raises leaves them asleep, for the run to end.
        """
        fell_asleep = await self._turns.sleep()
        yield
        if fell_asleep:
            await self._turns.wake()

    @contextlib.asynccontextmanager
    async def lend(self, workers: int) -> AsyncIterator["InferenceHub"]:
        """A hub over so many of the workers, while the block runs, with the weights they have now.

        This hub sends them nothing and publishes nothing to them meanwhile; what they were at,
        they finish. Afterwards they get the present weights and come back. One that fails is lost
        to the borrower, and back here once it is healthy. Raises InferenceFailure if there are not
        enough healthy workers to keep one.
        """
        async with self._publisher.lend(workers) as loan:
            share = InferenceHub(
                loan,
                max_running=self._max_running,
                version=loan.version,
                request_timeout_s=self._request_timeout_s,
                control_timeout_s=self._control_timeout_s,
                recovery_timeout_s=self._supervisor.recovery_timeout_s,
                progress_timeout_s=self._supervisor.progress_timeout_s,
            )
            try:
                async with share:
                    yield share
            finally:
                totals = share.stats()
                self._requests += totals.requests
                self._prompt_tokens += totals.prompt_tokens
                self._generated_tokens += totals.generated_tokens


async def _nothing() -> None:
    pass
