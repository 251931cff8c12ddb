"""New weights become the policy of the workers, in waves, and are probed there.

publish ──► each worker: pause, load, version, resume ──► probe against the trainer's logprobs
              │ the least busy first; half of them go on sampling meanwhile
              │ excluded? it catches up before it is back
              │ lent?     it keeps its version, and gets the present one when it is back
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from flash.errors import InferenceFailure, PublishFailure, first_error
from flash.hub.checks import check_completion
from flash.hub.loan import LentWorker, Loan
from flash.hub.policy import Policy, Replaced
from flash.hub.probe import Gap, Probe, check_gap
from flash.hub.queue import RequestQueue
from flash.hub.reports import PublishReport, WorkerPublish
from flash.hub.response import PartialCompletion
from flash.hub.slot import Slot
from flash.hub.turns import Turns
from flash.hub.waves import Waves, each, spared
from flash.hub.worker import BadRequest, WorkerFailure
from flash.types import Completion, SamplingParams, UpdateMode, Weights

logger = logging.getLogger(__name__)

Ask = Callable[[Slot, Sequence[int], SamplingParams, PartialCompletion], Awaitable[Completion]]


class Publisher:
    """Decides which worker has which version.

    Args:
        slots: the hub's own list, which it fills at its start.
        queue: it is told when a worker takes requests again.
        policy: what is published last.
        tasks: where lent workers get the present weights.
        turns: workers that sleep get what is published as they wake; None if none ever does.
        ask: gets one completion from one worker.
        exclude: takes a worker that failed out of the pool.
        update_mode, control_timeout_s, request_timeout_s, probe: as for the hub.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        queue: RequestQueue,
        policy: Policy,
        tasks: asyncio.TaskGroup,
        *,
        turns: Turns | None = None,
        ask: Ask,
        exclude: Callable[[Slot, WorkerFailure], None],
        update_mode: UpdateMode,
        control_timeout_s: float,
        request_timeout_s: float,
        probe: Probe,
    ) -> None:
        self._slots = slots
        self._queue = queue
        self._policy = policy
        self._tasks = tasks
        self._turns = turns
        self._ask = ask
        self._exclude = exclude
        self.update_mode = update_mode
        self._control_timeout_s = control_timeout_s
        self._request_timeout_s = request_timeout_s
        self._probe = probe
        self._waves = Waves()
        self._one_at_a_time = asyncio.Lock()  # who changes which worker has which version

    async def publish(self, weights: Weights) -> PublishReport:
        """Makes these weights the policy of every worker that is healthy and not lent."""
        async with self._one_at_a_time:
            self._queue.raise_failure()
            if weights.version <= self._policy.version:
                raise ValueError(
                    f"version {weights.version} is not newer than the published "
                    f"{self._policy.version}"
                )
            self._policy.announce(weights)
            if self._turns is not None and self._turns.asleep:
                paused_s = await self._turns.wake()
                replaced = {slot: Replaced(took_s, 0.0) for slot, took_s in paused_s.items()}
            else:
                paused_s, replaced = await self._update_all(weights)
            self._queue.raise_failure()
            self._policy.version = weights.version
            answers = await self._probed(weights, self._probe)
        gaps = await self._gaps(weights, self._probe, answers)
        return self._report(weights, paused_s, replaced, gaps)

    async def _update_all(self, weights: Weights) -> tuple[dict[Slot, float], dict[Slot, Replaced]]:
        """In waves; how long each was out, and what of it took how long."""
        clock = asyncio.get_running_loop().time
        paused_s: dict[Slot, float] = {}
        replaced: dict[Slot, Replaced] = {}

        async def update(slot: Slot) -> float | None:
            # Not those that are out, nor one that came back with these weights just now.
            if not slot.healthy or slot.lent is not None or slot.version == weights.version:
                return None
            started = clock()
            try:
                took = await self._update(slot, weights, self.update_mode)
            finally:
                paused_s[slot] = clock() - started
            if took is None:
                return None
            replaced[slot] = took
            return took.load_s

        sampling = sum(slot.healthy and slot.lent is None for slot in self._slots)
        least_busy_first = sorted(self._slots, key=lambda slot: slot.outstanding_tokens)
        await self._waves.over(least_busy_first, update, most_out=spared(sampling))
        return paused_s, replaced

    def _report(
        self,
        weights: Weights,
        paused_s: dict[Slot, float],
        replaced: dict[Slot, Replaced],
        gaps: dict[Slot, Gap],
    ) -> PublishReport:
        nothing = Replaced(0.0, 0.0)
        per_worker = tuple(
            WorkerPublish(
                name=slot.worker.name,
                updated=slot.healthy and slot.version == weights.version,
                paused_s=paused_s.get(slot, 0.0),
                load_s=replaced.get(slot, nothing).load_s,
                reset_s=replaced.get(slot, nothing).reset_s,
                gap=gaps.get(slot),
            )
            for slot in self._slots
        )
        return PublishReport(
            version=weights.version,
            gap=Gap.worst(list(gaps.values())),
            paused_s=sum(paused_s.values()),
            load_s=sum(took.load_s for took in replaced.values()),
            reset_s=sum(took.reset_s for took in replaced.values()),
            workers=sum(worker.updated for worker in per_worker),
            per_worker=per_worker,
            changed=weights.changed,
        )

    async def probe(self, weights: Weights, probe: Probe | None) -> Gap | None:
        """The worst gap of any worker; None if none could be asked."""
        probe = probe or self._probe
        async with self._one_at_a_time:
            answers = await self._probed(weights, probe)
        return Gap.worst(list((await self._gaps(weights, probe, answers)).values()))

    @contextlib.asynccontextmanager
    async def lend(self, workers: int) -> AsyncIterator[Loan]:
        """So many workers, the least busy ones, with the present version while the block runs.

        Afterwards they get what was published meanwhile and come back. Raises InferenceFailure if
        there are not enough healthy workers to keep one.
        """
        async with self._one_at_a_time:  # not between two versions
            version = self._policy.version
            able = [slot for slot in self._slots if slot.accepting and slot.version == version]
            if len(able) <= workers:
                raise InferenceFailure(
                    f"{workers} of {len(able)} healthy workers can't be lent: one must stay"
                )
            slots = sorted(able, key=lambda slot: slot.outstanding_tokens)[:workers]
            lent = [LentWorker(slot.worker) for slot in slots]
            for slot, worker in zip(slots, lent, strict=True):
                slot.lent = worker
        try:
            yield Loan(lent, version)
        finally:
            self._tasks.create_task(self._rejoin(slots), name=f"rejoin {len(slots)} workers")

    async def _rejoin(self, slots: Sequence[Slot]) -> None:
        """Lent workers come back, with the present weights."""
        async with self._one_at_a_time:
            # Nobody of the pool stops sampling for them.
            await each(slots, self._bring_back, room=lambda: self._waves.size)

    async def _bring_back(self, slot: Slot) -> None:
        lent, slot.lent = slot.lent, None
        assert lent is not None
        slot.busy_s += lent.busy_s
        if lent.failed and slot.healthy:
            self._exclude(slot, WorkerFailure(f"{slot.worker.name}: {lent.failed}"))
        weights = self._policy.weights
        if slot.healthy and weights is not None and slot.version != self._policy.version:
            try:
                await self._update(slot, weights, "keep")
            except PublishFailure as failure:
                logger.warning("%s came back from an evaluation: %s", slot.worker.name, failure)
        self._queue.accepts(slot)

    async def _update(self, slot: Slot, weights: Weights, mode: UpdateMode) -> Replaced | None:
        """Replaces one worker's weights. Afterwards it has them, or is excluded."""
        timeout_s = self._control_timeout_s
        if mode == "wait":  # for the requests that it has, as long as each may take
            timeout_s += self._request_timeout_s
        slot.updating = True
        try:
            async with slot.control(timeout_s):
                return await self._policy.replace_weights(slot, weights, mode)
        except WorkerFailure as failure:
            self._exclude(slot, failure)
            return None
        except BadRequest as error:
            self._exclude(slot, WorkerFailure(str(error)))
            raise PublishFailure(f"version {weights.version}: {error}") from error
        except asyncio.CancelledError:
            # It may be paused, or between two weights.
            self._exclude(slot, WorkerFailure(f"{slot.worker.name}: its publish was cancelled"))
            raise
        finally:
            slot.updating = False
            self._queue.accepts(slot)

    async def _probed(self, weights: Weights, probe: Probe) -> dict[Slot, list[Completion]]:
        """What each worker that could be asked answers; of none if nobody can `score`.

        All are asked everything at the same time.
        """
        if weights.score is None:
            return {}
        sampling = SamplingParams(max_tokens=probe.tokens)
        answers: dict[Slot, list[Completion]] = {}

        async def answer(slot: Slot, prompt: Sequence[int]) -> Completion:
            partial = PartialCompletion(weights.version, sampling.temperature)
            completion = await self._ask(slot, prompt, sampling, partial)
            check_completion(completion, prompt, sampling, self._policy.published)
            if not completion.token_ids:
                raise WorkerFailure(f"{slot.worker.name} aborted the probe")
            return completion

        async def ask(slot: Slot) -> None:
            try:
                with first_error():
                    async with asyncio.TaskGroup() as asking:
                        tasks = [
                            asking.create_task(answer(slot, prompt), name=f"probe {number}")
                            for number, prompt in enumerate(probe.prompts)
                        ]
                answers[slot] = [task.result() for task in tasks]
            except WorkerFailure as failure:
                self._exclude(slot, failure)
            except BadRequest as error:
                raise PublishFailure(f"{slot.worker.name} refused the probe: {error}") from error

        able = [s for s in self._slots if s.healthy and s.version == weights.version]
        await each(able, ask)
        return {slot: answers[slot] for slot in able if slot in answers}

    async def _gaps(
        self, weights: Weights, probe: Probe, answers: Mapping[Slot, Sequence[Completion]]
    ) -> dict[Slot, Gap]:
        """Of what workers have answered; the trainer is asked once.

        It may take the workers' GPUs for it, where they take turns: nothing is locked.
        """
        if weights.score is None or not answers:
            return {}
        asked = list(answers)
        expected = await weights.score(
            [
                [*prompt, *completion.token_ids]
                for slot in asked
                for prompt, completion in zip(probe.prompts, answers[slot], strict=True)
            ]
        )
        if expected is None:
            return {}
        logprobs = iter(expected.logprobs)
        return {
            slot: check_gap(
                answers[slot],
                replace(expected, logprobs=list(itertools.islice(logprobs, len(probe.prompts)))),
                probe=probe,
                version=weights.version,
            )
            for slot in asked
        }
