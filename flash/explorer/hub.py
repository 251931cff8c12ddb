"""The hub of a run with explorers: its policy is theirs, and that of workers here if there are."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from flash.errors import InferenceFailure
from flash.explorer.fleet import Fleet
from flash.explorer.messages import Files, Publish, Score
from flash.hub.hub import InferenceHub
from flash.hub.probe import Gap, Probe
from flash.hub.reports import HubStats, PublishReport, WorkerStats
from flash.types import Completion, GenerateRequest, Scores, Weights

_SESSION = "episode-"
_KEPT = 2  # versions of weights that may be sent: so many the trainer keeps
_COMPARED_EVERY = 25  # publishes: what waiting costs then is 4% of the time at most


class OfferWeights(Protocol):
    """`FileServer.offer`."""

    def __call__(self, folder: Path, *, before: Files | None = None) -> Awaitable[Files]: ...


class FleetHub:
    """Publishes to all, and waits for the workers here alone: what an explorer lacks the weights
    for, it is not given.

    Args:
        local: over the workers here, if there are any.
        version: of the weights that everybody starts with.
        offer: lets explorers have a folder of weights, and what changed since those before.
        is_idle: whether the trainer has time for what explorers ask: it does not make a step wait.
            Where it never has, it takes some: every 25th publish waits for those that it could not
            answer, as long as a step took on average since the last of these, and no longer.
    """

    def __init__(
        self,
        local: InferenceHub | None,
        *,
        version: int,
        offer: OfferWeights,
        is_idle: Callable[[], bool] = lambda: True,
    ) -> None:
        self.local = local
        self._version = version
        self._offer = offer
        self._is_idle = is_idle
        self._recent: deque[Weights] = deque(maxlen=_KEPT)
        self._message: Publish | None = None
        self._publishes = 0
        self._waits = False  # for what explorers ask
        self._waited_at: float | None = None  # or the first publish

    def over(self, fleet: Fleet) -> None:
        """Whom it publishes to."""
        self._fleet = fleet

    @property
    def version(self) -> int:
        """The policy version that was published last."""
        return self._version if self.local is None else self.local.version

    @property
    def message(self) -> Publish | None:
        """What an explorer that comes now is told of the weights."""
        return self._message

    async def publish(self, weights: Weights) -> PublishReport:
        """Makes these weights the policy; errors are those of the hub here."""
        if weights.version <= self.version:
            raise ValueError(
                f"version {weights.version} is not newer than the published {self.version}"
            )
        before = None if self._message is None else self._message.files
        files = await self._offer(weights.path, before=before)
        self._recent.append(weights)
        self._message = Publish(weights.version, files, probe=weights.score is not None)
        self._fleet.updates.publish(self._message)
        self._publishes += 1
        within_s = 0.0 if weights.score is None else self._may_wait_s()
        self._waits = within_s > 0
        try:
            report = await self._publish_here(weights)
            if self._waits:
                await self._fleet.updates.compared(within_s=within_s)
                self._waited_at = asyncio.get_running_loop().time()
        finally:
            self._waits = False
        return report

    def _may_wait_s(self) -> float:
        """For explorers; 0 most of the time."""
        now = asyncio.get_running_loop().time()
        if self._waited_at is None:
            self._waited_at = now
        due = self._publishes % _COMPARED_EVERY == 0
        return (now - self._waited_at) / _COMPARED_EVERY if due else 0.0

    async def _publish_here(self, weights: Weights) -> PublishReport:
        if self.local is not None:
            return await self.local.publish(weights)
        self._version = weights.version
        return PublishReport(
            version=weights.version,
            gap=None,
            paused_s=0.0,
            load_s=0.0,
            reset_s=0.0,
            workers=0,
            per_worker=(),
            changed=weights.changed,
        )

    def weights_of(self, version: int) -> Weights | None:
        """If they were published lately."""
        return next((each for each in self._recent if each.version == version), None)

    async def score(self, question: Score) -> Scores | None:
        """The trainer's logprobs, if it is at that version and does nothing else, or waits."""
        weights = self.weights_of(question.version)
        if weights is None or weights.score is None or weights is not self._recent[-1]:
            return None
        if not (self._waits or self._is_idle()):
            return None
        return await weights.score(question.sequences)

    async def generate(
        self,
        request: GenerateRequest,
        on_start: Callable[[int], None] | None = None,
        on_sampled: Callable[[int], None] | None = None,
    ) -> Completion:
        return await self._here().generate(request, on_start, on_sampled)

    def forget(self, session: str) -> None:
        if self.local is not None:
            self.local.forget(session)

    async def probe(self, weights: Weights, probe: Probe | None = None) -> Gap | None:
        """As of the hub here; None if there is none."""
        return None if self.local is None else await self.local.probe(weights, probe)

    @contextlib.asynccontextmanager
    async def lend(self, workers: int) -> AsyncIterator[InferenceHub]:
        async with self._here().lend(workers) as share:
            yield share

    def stats(self) -> HubStats:
        """The sums of all, of those that are gone too: they never fall. Workers of explorers are
        named after these."""
        told = self._fleet.stats()
        here = [] if self.local is None else [self.local.stats()]
        parts, counted = [*here, *told.values()], [*here, *self._fleet.counted()]
        workers: list[WorkerStats] = [worker for stats in here for worker in stats.workers]
        for name, stats in told.items():
            workers += (replace(each, name=f"{name}: {each.name}") for each in stats.workers)
        return HubStats(
            version=self.version,
            queued=sum(part.queued for part in parts),
            running=sum(part.running for part in parts),
            prompt_tokens=sum(part.prompt_tokens for part in counted),
            generated_tokens=sum(part.generated_tokens for part in counted),
            requests=sum(part.requests for part in counted),
            retries=sum(part.retries for part in counted),
            publishes=self._publishes,
            paused_s=sum(part.paused_s for part in counted),
            load_s=sum(part.load_s for part in counted),
            reset_s=sum(part.reset_s for part in counted),
            mixed_tokens=sum(part.mixed_tokens for part in counted),
            workers=tuple(workers),
        )

    def whereabouts(self, session: str) -> str:
        episode = session.removeprefix(_SESSION)
        with contextlib.suppress(ValueError):
            if explorer := self._fleet.where_is(int(episode)):
                return explorer
        return "" if self.local is None else self.local.whereabouts(session)

    def give_up(self, worker: str, why: str) -> None:
        if self.local is not None:
            self.local.give_up(worker, why)

    def _here(self) -> InferenceHub:
        if self.local is None:
            raise InferenceFailure("there are no workers here (engine.workers=0), but at explorers")
        return self.local
