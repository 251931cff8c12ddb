"""The seams between the hub and a worker, whatever it runs on, and a pool that starts workers."""

from collections.abc import Callable, Sequence
from typing import Protocol

from flash.errors import FlashError
from flash.types import Completion, SamplingParams, UpdateMode, Weights


class WorkerFailure(FlashError):
    """The worker did not answer, or answered that it can't; the request may go elsewhere."""


class WorkerBusy(WorkerFailure):
    """It has had as many requests as it takes for a while."""


class WorkerBroken(WorkerFailure):
    """It answers what can't be true, or hangs: if it gets well at all, by being started anew."""


class WeightsGone(WorkerFailure):
    """The weights that it should get were replaced meanwhile; it lacks them, and is well."""


class BadRequest(FlashError):
    """The worker refused this request; another worker would too."""


OnTokens = Callable[[Sequence[int], Sequence[float]], None]


class Worker(Protocol):
    """One inference engine. Every method raises WorkerFailure when the worker fails.

    `constrains` says whether it can keep a response to `SamplingParams.constraint`; one that says
    no is asked for none.

    `generate` raises BadRequest for a request that no worker would take. When it is cancelled the
    hub calls `abort` with the same `request_id`. A worker that can tell of tokens before the
    answer is whole calls `on_tokens(token_ids, logprobs)` with those since the last call; the
    answer holds them again.

    After `load_weights` either `recompute` is called, or the pause was `keep_stale_kv`: then what
    runs keeps its keys and values, and no later request may get them.
    """

    name: str

    @property
    def constrains(self) -> bool: ...

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None = None,
    ) -> Completion: ...

    async def abort(self, request_id: str) -> None: ...

    async def pause(self, mode: UpdateMode) -> None: ...

    async def load_weights(self, weights: Weights) -> None: ...

    async def recompute(self) -> None:
        """Keys and values of the weights before serve nobody: what runs computes them anew, so
        that every token is sampled by one version alone."""
        ...

    async def set_version(self, version: int) -> None: ...

    async def resume(self) -> None: ...

    async def sleep(self, mode: UpdateMode) -> None:
        """Pauses, and gives away the memory of its GPU; its weights are gone."""
        ...

    async def wake_weights(self) -> None:
        """Has memory for weights again, which are to be loaded then."""
        ...

    async def wake_rest(self) -> None:
        """Has the rest of its memory again, and goes on."""
        ...

    async def check_health(self) -> None: ...

    async def close(self) -> None: ...


# worker, why, final: it died; after a final death it is not started again.
OnExit = Callable[[Worker, str, bool], None]
# It lives again, with its first weights.
OnReady = Callable[[Worker], None]


class Pool(Protocol):
    """Workers that the hub starts and ends, and the pool starts anew when they die."""

    async def start(self, on_exit: OnExit, on_ready: OnReady) -> list[Worker]: ...

    def restart(self, worker: Worker) -> None:
        """Ends a worker that is of no use any more; `on_exit` and `on_ready` tell of it as ever."""
        ...

    def hold(self) -> None:
        """From now on no process is started."""
        ...

    def release(self) -> None:
        """From now on processes are started again, in the place of those that died meanwhile."""
        ...

    async def stop(self) -> None: ...
