"""A server that has the weights it has: it is asked for tokens, and told nothing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from flash.hub.worker import OnTokens
from flash.types import Completion, SamplingParams, UpdateMode, Weights


class Sampler(Protocol):
    """What such a server needs of a worker's client; all is as of `flash.hub.worker.Worker`."""

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

    async def check_health(self) -> None: ...

    async def close(self) -> None: ...


class FixedWorker:
    """A worker whose weights are somebody else's, for evaluations: none are loaded, and of its
    control routes it needs none but its health. All that it samples is of version 0."""

    def __init__(self, worker: Sampler) -> None:
        self.name = worker.name
        self.constrains = worker.constrains
        self._worker = worker

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        completion = await self._worker.generate(request_id, token_ids, sampling, on_tokens)
        return replace(completion, versions=[0] * len(completion.token_ids))

    async def abort(self, request_id: str) -> None:
        await self._worker.abort(request_id)

    async def check_health(self) -> None:
        await self._worker.check_health()

    async def close(self) -> None:
        await self._worker.close()

    async def pause(self, mode: UpdateMode) -> None:
        """Nothing is published."""

    async def load_weights(self, weights: Weights) -> None:
        raise AssertionError("its weights are not ours")

    async def recompute(self) -> None:
        """It keeps its keys and values."""

    async def set_version(self, version: int) -> None:
        """It has none of ours."""

    async def resume(self) -> None:
        """It was not paused."""

    async def sleep(self, mode: UpdateMode) -> None:
        raise AssertionError("its GPU is not ours")

    async def wake_weights(self) -> None:
        raise AssertionError("its GPU is not ours")

    async def wake_rest(self) -> None:
        raise AssertionError("its GPU is not ours")
