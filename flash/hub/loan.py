"""Workers lent by one hub to another: for an evaluation beside the rollout, on pinned weights."""

import asyncio
from collections.abc import Sequence

from flash.hub.worker import OnExit, OnReady, OnTokens, Worker, WorkerFailure
from flash.types import Completion, SamplingParams, UpdateMode, Weights


class LentWorker:
    """A worker in the borrower's hands: answers, and takes no weights.

    Its first failure ends the loan: whatever comes back may have other weights, and what they
    sample would not be what the borrower is told.
    """

    def __init__(self, worker: Worker) -> None:
        self.name = worker.name
        self.constrains = worker.constrains
        self.failed = ""  # why, if it has
        self._busy_s = 0.0
        self._worker = worker
        self._running = 0
        self._since = 0.0
        self._on_exit: OnExit | None = None

    @property
    def busy_s(self) -> float:
        """Seconds in which it had requests of the borrower's."""
        now = asyncio.get_running_loop().time()
        return self._busy_s + (now - self._since) * (self._running > 0)

    def start(self, on_exit: OnExit) -> None:
        self._on_exit = on_exit

    def end(self, why: str) -> None:
        """The lender has lost it, or the borrower finds it useless."""
        if not self.failed:
            self.failed = why
            if self._on_exit is not None:
                self._on_exit(self, why, True)

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        self._raise_failure()
        clock = asyncio.get_running_loop().time
        if self._running == 0:
            self._since = clock()
        self._running += 1
        try:
            return await self._worker.generate(request_id, token_ids, sampling, on_tokens)
        except WorkerFailure as failure:
            self.end(str(failure))
            raise
        finally:
            self._running -= 1
            if self._running == 0:
                self._busy_s += clock() - self._since

    async def abort(self, request_id: str) -> None:
        await self._worker.abort(request_id)

    async def check_health(self) -> None:
        self._raise_failure()
        await self._worker.check_health()

    async def set_version(self, version: int) -> None:
        """The lender has told it that version."""
        self._raise_failure()

    async def resume(self) -> None:
        self._raise_failure()

    async def pause(self, mode: UpdateMode) -> None:
        raise AssertionError("a lent worker takes no weights")

    async def load_weights(self, weights: Weights) -> None:
        raise AssertionError("a lent worker takes no weights")

    async def sleep(self, mode: UpdateMode) -> None:
        raise AssertionError("a lent worker does not sleep")

    async def wake_weights(self) -> None:
        raise AssertionError("a lent worker does not sleep")

    async def wake_rest(self) -> None:
        raise AssertionError("a lent worker does not sleep")

    async def recompute(self) -> None:
        raise AssertionError("a lent worker takes no weights")

    async def close(self) -> None:
        """It is the lender's."""

    def _raise_failure(self) -> None:
        if self.failed:
            raise WorkerFailure(f"{self.name}: {self.failed}")


class Loan:
    """Lent workers, all with the weights of `version`, as a pool that starts none anew."""

    def __init__(self, workers: Sequence[LentWorker], version: int) -> None:
        self.version = version
        self._workers = workers

    async def start(self, on_exit: OnExit, on_ready: OnReady) -> list[Worker]:
        for worker in self._workers:
            worker.start(on_exit)
        return list(self._workers)

    def restart(self, worker: Worker) -> None:
        for lent in self._workers:
            if lent is worker:
                lent.end("it hangs, or answers nonsense")

    def hold(self) -> None:
        pass

    def release(self) -> None:
        pass

    async def stop(self) -> None:
        pass
