"""A worker behind SGLang's native HTTP routes, which need nothing of ours in the server.

Written after SGLang 0.5.23. A publish is one call: weights, their version and the end of old keys
and values change between two steps, so versions of tokens are exact whoever asks meanwhile.
"""

import asyncio
from collections.abc import Sequence

import msgspec

from flash.hub.server_client import STREAM_INTERVAL, STREAMED_FROM_TOKENS, ServerClient
from flash.hub.sglang_answers import SglangStream, completion_of, decode_answer
from flash.hub.worker import BadRequest, OnTokens, WorkerFailure
from flash.types import Completion, SamplingParams, UpdateMode, Weights

_GENERATE = "/generate"


class _Sampling(msgspec.Struct, gc=False):
    """What a request leaves out would be as the server's --preferred-sampling-params say."""

    max_new_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stream_interval: int | msgspec.UnsetType = msgspec.UNSET


class _Request(msgspec.Struct, gc=False, omit_defaults=True):
    rid: str
    input_ids: list[int]
    sampling_params: _Sampling
    return_logprob: bool
    cache_salt: str = ""
    stream: bool = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0


class _ServerInfo(msgspec.Struct):
    disable_overlap_schedule: bool = False


class SglangWorker(ServerClient):
    """Client of one SGLang server at `url`. Deadlines are the caller's."""

    constrains = False  # its grammars need the tokenizer that it is started without

    def __init__(self, url: str, *, api_key: str = "") -> None:
        super().__init__(url, api_key=api_key)
        self._keeps_stale = False
        self._cache_salt = ""  # requests with another one share no keys and values
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        request = _Request(
            _rid(request_id),
            token_ids if isinstance(token_ids, list) else list(token_ids),
            _Sampling(
                sampling.max_tokens,
                sampling.temperature,
                sampling.stop_token_ids,
                ignore_eos=not sampling.stop_token_ids,  # SGLang would ignore these as well
            ),
            return_logprob=True,
            cache_salt=self._cache_salt,
            return_routed_experts=sampling.experts_from is not None,
            routed_experts_start_len=sampling.experts_from or 0,
        )
        self._running += 1
        self._idle.clear()
        try:
            if on_tokens is not None and sampling.max_tokens >= STREAMED_FROM_TOKENS:
                request.sampling_params.stream_interval = STREAM_INTERVAL
                request.stream = True
                tokens = len(token_ids) + sampling.max_tokens
                stream = SglangStream(self.name, on_tokens, tokens=tokens)
                return await self._streamed(_GENERATE, request, stream, sampling)
            return self._whole(await self._call("POST", _GENERATE, request), sampling)
        finally:
            self._running -= 1
            if self._running == 0:
                self._idle.set()

    async def abort(self, request_id: str) -> None:
        await self._call("POST", "/abort_request", {"rid": _rid(request_id)})

    async def pause(self, mode: UpdateMode) -> None:
        self._keeps_stale = mode == "keep_stale_kv"
        if self._keeps_stale:
            await self._check_steps_do_not_overlap()
            await self._pause("in_place")
            return
        if mode == "wait":
            await self._idle.wait()
        elif mode == "abort":
            await self.resume()  # what a pause that broke off has left frozen could not end
            await self._pause("abort")
        # Keys and values can be dropped only after it, even where nothing runs any more.
        await self._pause("retract")

    async def load_weights(self, weights: Weights) -> None:
        body = {
            "model_path": str(weights.path),
            "load_format": "auto",  # the server may have started with dummy weights
            "flush_cache": not self._keeps_stale,
            "weight_version": str(weights.version),
        }
        try:
            await self._call("POST", "/update_weights_from_disk", body)
        except (WorkerFailure, BadRequest) as failure:
            raise WorkerFailure(
                f"{failure} (it must serve the model that is trained, and see the files in "
                f"{weights.path})"
            ) from failure

    async def recompute(self) -> None:
        """Nothing is left to do: the load has dropped keys and values."""

    async def set_version(self, version: int) -> None:
        body = {"new_version": str(version), "abort_all_requests": False}
        await self._call("POST", "/update_weight_version", body)
        if self._keeps_stale:
            self._cache_salt = str(version)

    async def resume(self) -> None:
        await self._call("POST", "/continue_generation", {})

    async def sleep(self, mode: UpdateMode) -> None:
        await self.pause(mode)
        await self._call("POST", "/release_memory_occupation", {"tags": ["kv_cache", "weights"]})

    async def wake_weights(self) -> None:
        await self._call("POST", "/resume_memory_occupation", {"tags": ["weights"]})

    async def wake_rest(self) -> None:
        await self._call("POST", "/resume_memory_occupation", {"tags": ["kv_cache"]})
        await self.resume()

    async def check_health(self) -> None:
        # /health samples a token, which a server does not that a broken publish has left paused;
        # this asks its scheduler too.
        await self._call("GET", "/server_info")

    async def _pause(self, mode: str) -> None:
        await self._call("POST", "/pause_generation", {"mode": mode})

    async def _check_steps_do_not_overlap(self) -> None:
        """Under `in_place` a token that was on its way would count as one of the new version."""
        answer = await self._call("GET", "/server_info")
        with self._readable(answer):
            info = msgspec.json.decode(answer, type=_ServerInfo)
        if not info.disable_overlap_schedule:
            raise BadRequest(
                f"{self.name} computes a step while it reads the one before, so it can't tell "
                f"which version sampled a token under engine.update_mode=keep_stale_kv: start it "
                f"with --disable-overlap-schedule, or use engine.update_mode=keep"
            )

    def _whole(self, answer: bytes, sampling: SamplingParams) -> Completion:
        with self._readable(answer):
            decoded = decode_answer(answer)
            token_ids, logprobs = decoded.after(0, self.name)
            return completion_of(decoded, token_ids, logprobs, sampling, self.name)


def _rid(request_id: str) -> str:
    """As SGLang knows it, which aborts every request whose id begins with the one that it gets."""
    return f"{request_id}."
