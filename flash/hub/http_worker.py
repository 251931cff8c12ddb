"""A worker behind vLLM's token-in-token-out HTTP protocol: a vLLM server or the embedded worker."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from flash.hub.answers import TokenStream, completion_of, decode_answer
from flash.hub.server_client import STREAM_INTERVAL, STREAMED_FROM_TOKENS, ServerClient
from flash.hub.worker import BadRequest, OnTokens, WorkerBroken, WorkerFailure
from flash.types import Completion, SamplingParams, UpdateMode, Weights
from flash.worker.checksum import checksum
from flash.worker.delta import Delta, Had, delta_of, not_had
from flash.worker.vllm_extension import ADAPTERS

logger = logging.getLogger(__name__)

# vLLM puts it before the client's request_id, and abort_requests wants it there.
_REQUEST_PREFIX = "generate-tokens-"
_GENERATE = "/inference/v1/generate"


class _StructuredOutputs(msgspec.Struct, gc=False):
    structural_tag: str


class _Sampling(msgspec.Struct, gc=False):
    """How a worker is to sample; as a struct it is encoded in half the time of a dictionary."""

    max_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool = True  # a request says where it stops, all of it
    logprobs: int = 0
    stream_interval: int | msgspec.UnsetType = msgspec.UNSET
    routed_experts_prompt_start: int | msgspec.UnsetType = msgspec.UNSET
    stop: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    structured_outputs: _StructuredOutputs | msgspec.UnsetType = msgspec.UNSET


class _Request(msgspec.Struct, gc=False, omit_defaults=True):
    request_id: str
    token_ids: list[int]
    sampling_params: _Sampling
    cache_salt: str = ""
    stream: bool = False
    model: str = ""  # the server's own, or its adapter
    reasoning_ended: bool = False  # whatever its parser thinks: a constraint has room for thoughts


class _Results(msgspec.Struct):
    """What the ranks of a worker answer, whatever it is."""

    results: list[Any]


class _Loaded(msgspec.Struct):
    """What the ranks of a worker say of the weights that they loaded."""

    results: list[str]


class _Changed(msgspec.Struct):
    """What the ranks of a worker have after a delta; None of one that has other weights."""

    results: list[list[Had] | None]


class _Reset(msgspec.Struct):
    success: bool


_decode_loaded = msgspec.json.Decoder(_Loaded).decode
_decode_results = msgspec.json.Decoder(_Results).decode
_decode_changed = msgspec.json.Decoder(_Changed).decode
_decode_reset = msgspec.json.Decoder(_Reset).decode


class HttpWorker(ServerClient):
    """Client of one worker at `url`. Deadlines are the caller's.

    `constrains`: it is none of the embedded ones, which refuse constraints by name.
    """

    def __init__(self, url: str, *, api_key: str = "", constrains: bool = True) -> None:
        super().__init__(url, api_key=api_key)
        self.constrains = constrains
        self._keeps_stale = False
        self._cache_salt = ""  # requests with another one share no keys and values
        self._model = ""
        self._has: Path | None = None  # whose weights it has, as far as is known here
        self._takes_deltas = True

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        request = _Request(
            request_id,
            token_ids if isinstance(token_ids, list) else list(token_ids),
            _Sampling(sampling.max_tokens, sampling.temperature, sampling.stop_token_ids),
            cache_salt=self._cache_salt,
            model=self._model,
        )
        if sampling.stop:
            request.sampling_params.stop = sampling.stop
        if sampling.constraint is not None:
            request.sampling_params.structured_outputs = _StructuredOutputs(sampling.constraint)
            request.reasoning_ended = True
            # A grammar may end with any end of a text that the model has: the answer must, too.
            request.sampling_params.ignore_eos = False
        if sampling.experts_from is not None:
            request.sampling_params.routed_experts_prompt_start = sampling.experts_from
        if on_tokens is not None and sampling.max_tokens >= STREAMED_FROM_TOKENS:
            request.sampling_params.stream_interval = STREAM_INTERVAL
            request.stream = True
            tokens = len(token_ids) + sampling.max_tokens
            stream = TokenStream(self.name, on_tokens, tokens=tokens)
            return await self._streamed(_GENERATE, request, stream, sampling)
        return self._whole(await self._call("POST", _GENERATE, request), sampling)

    async def abort(self, request_id: str) -> None:
        body = {"request_ids": [_REQUEST_PREFIX + request_id]}
        await self._call("POST", "/inference/v1/abort_requests", body)

    async def pause(self, mode: UpdateMode) -> None:
        self._keeps_stale = mode == "keep_stale_kv"
        mode = "keep" if self._keeps_stale else mode
        # vLLM 0.32 would drop keys and values here, also under `keep`, whatever its help says.
        await self._call("POST", f"/pause?mode={mode}&clear_cache=false")

    async def load_weights(self, weights: Weights) -> None:
        if weights.adapters:
            await self._load_adapters(weights)
            return
        had, self._has = self._has, None
        if weights.shared is not None and await self._load_shared(weights.shared):
            return
        await self._load_after(had, weights)
        self._has = weights.path

    async def _load_after(self, had: Path | None, weights: Weights) -> None:
        """By what changed of the weights that it had, if that is all it takes, and can be."""
        delta = delta_of(weights.path) if had is not None and self._takes_deltas else None
        if delta is None or delta.before != str(had):
            await self._load_whole(weights)
            return
        try:
            loaded = await self._load_delta(weights, delta)
        except WorkerBroken:
            raise
        except (WorkerFailure, BadRequest) as failure:
            await self._load_whole(weights)
            # Which it could: it is well, and would not take the next delta either.
            self._takes_deltas = False
            logger.warning("%s gets whole weights from now on: %s", self.name, failure)
        else:
            if not loaded:
                await self._load_whole(weights)

    async def _load_adapters(self, weights: Weights) -> None:
        """In the place of those before, for requests that run too."""
        # Given in place by this route, a request would go on with those that it began with.
        body = {"lora_name": ADAPTERS, "lora_path": str(weights.path)}
        try:
            await self._call("POST", "/v1/load_lora_adapter", body)
        except BadRequest as refusal:
            if "already been loaded" not in str(refusal):
                raise WorkerFailure(str(refusal)) from refusal
        await self._load_whole(weights)
        self._model = ADAPTERS

    async def _load_shared(self, directory: Path) -> bool:
        """From memory of the trainer's, on the same device; no if that can't be."""
        try:
            await self._rpc("load_shared_flash_weights", directory=str(directory))
        except WorkerFailure as failure:
            logger.warning("weights come as files, not from the trainer's memory: %s", failure)
            return False
        return True

    async def _load_delta(self, weights: Weights, delta: Delta) -> bool:
        """No if it was started anew, and has others than the delta changes."""
        answer = await self._rpc("load_flash_delta", directory=str(weights.path))
        return self._has_all_after(delta, answer)

    def _has_all_after(self, delta: Delta, answer: bytes) -> bool:
        """WorkerFailure if what it says that it has is not what it should have."""
        with self._readable(answer):
            ranks = [rank for rank in _decode_changed(answer).results if rank is not None]
            lacking = not_had(delta, ranks) if ranks else None
        if lacking is not None:
            raise WorkerFailure(f"{self.name} has not all of {lacking} after a delta")
        return bool(ranks)

    async def _load_whole(self, weights: Weights) -> None:
        path = weights.path
        method = "load_flash_adapters" if weights.adapters else "load_flash_weights"
        try:
            answer = await self._rpc(method, weights_path=str(path))
        except WorkerFailure as failure:
            raise WorkerFailure(
                f"{failure} (it must serve the model that is trained, and see the files in {path})"
            ) from failure
        wanted = await asyncio.to_thread(checksum, path)
        with self._readable(answer):
            loaded = set(_decode_loaded(answer).results)
        if loaded != {wanted}:
            raise WorkerFailure(
                f"{self.name} has read other weights in {path} than are there now: checksum "
                f"{' and '.join(sorted(loaded))}, not {wanted}"
            )

    async def recompute(self) -> None:
        route = "/reset_prefix_cache?reset_running_requests=true&reset_external=true"
        answer = await self._call("POST", route)
        with self._readable(answer):
            if not _decode_reset(answer).success:
                raise WorkerFailure(f"{self.name} can't drop the keys and values of old weights")

    async def set_version(self, version: int) -> None:
        await self._call("POST", "/update_weight_version", {"new_version": str(version)})
        if self._keeps_stale:
            self._cache_salt = str(version)

    async def resume(self) -> None:
        await self._call("POST", "/resume")

    async def sleep(self, mode: UpdateMode) -> None:
        self._has = None
        # At level 1 the weights would be kept in host memory, and who wakes it has newer ones.
        await self._call("POST", f"/sleep?level=2&mode={mode}")

    async def wake_weights(self) -> None:
        await self._call("POST", "/wake_up?tags=weights")

    async def wake_rest(self) -> None:
        await self._call("POST", "/wake_up?tags=kv_cache")

    async def check_health(self) -> None:
        await self._call("GET", "/health")

    async def _rpc(self, method: str, **kwargs: Any) -> bytes:
        """Of a method that our extension gives vLLM's ranks: what each of them answers.

        WorkerFailure if one answers with an error.
        """
        answer = await self._call("POST", "/collective_rpc", {"method": method, "kwargs": kwargs})
        with self._readable(answer):
            for result in _decode_results(answer).results:
                if isinstance(result, dict):
                    raise WorkerFailure(f"{self.name}: {method}: {result.get('error')}")
        return answer

    def _whole(self, answer: bytes, sampling: SamplingParams) -> Completion:
        with self._readable(answer):
            choice = decode_answer(answer).choices[0]
            return completion_of(choice, choice.token_ids, choice.numbers(), sampling, self.name)
