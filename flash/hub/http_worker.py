"""A worker behind vLLM's token-in-token-out HTTP protocol: a vLLM server or the embedded worker."""

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from flash.hub.worker import BadRequest, WorkerFailure
from flash.types import Completion, FinishReason, SamplingParams, UpdateMode

# vLLM puts it before the client's request_id, and abort_requests wants it there.
_REQUEST_PREFIX = "generate-tokens-"
_HTTP_SERVER_ERROR = 500
_HTTP_CLIENT_ERROR = 400
# Their fault is not the request's: the worker is busy or gone, or lacks our key.
_HTTP_NOT_THE_REQUEST = (401, 403, 404, 408, 429)


class _Entry(msgspec.Struct, gc=False):
    logprob: float


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_Entry]


class _Span(msgspec.Struct, gc=False):
    version: str
    start: int
    end: int


class _Choice(msgspec.Struct, gc=False):
    token_ids: list[int]
    logprobs: _Logprobs
    finish_reason: FinishReason
    weight_versions: list[_Span]


class _Answer(msgspec.Struct, gc=False):
    """What is read of an answer. Its other fields (vLLM repeats each logprob) become no objects,
    which costs a ninth of json.loads, and leaves the garbage collector nothing to walk through."""

    choices: list[_Choice]


_decode_answer = msgspec.json.Decoder(_Answer).decode


class HttpWorker:
    """Client of one worker at `url`. Deadlines are the caller's."""

    def __init__(self, url: str, *, api_key: str = "") -> None:
        self.name = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def generate(
        self, request_id: str, token_ids: Sequence[int], sampling: SamplingParams
    ) -> Completion:
        body = {
            "request_id": request_id,
            "token_ids": list(token_ids),
            "sampling_params": {
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "stop_token_ids": list(sampling.stop_token_ids),
                "logprobs": 0,
            },
        }
        answer = await self._call("POST", "/inference/v1/generate", body)
        try:
            return _completion(_decode_answer(answer).choices[0], self.name)
        except (IndexError, ValueError) as error:  # msgspec's errors are ValueErrors
            raise WorkerFailure(
                f"{self.name} answered what this protocol does not know ({error!r}): "
                f"{_text(answer)[:300]}"
            ) from error

    async def abort(self, request_id: str) -> None:
        body = {"request_ids": [_REQUEST_PREFIX + request_id]}
        await self._call("POST", "/inference/v1/abort_requests", body)

    async def pause(self, mode: UpdateMode) -> None:
        await self._call("POST", f"/pause?mode={mode}")

    async def load_weights(self, path: Path) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        await self._call("POST", "/collective_rpc", body)

    async def set_version(self, version: int) -> None:
        await self._call("POST", "/update_weight_version", {"new_version": str(version)})

    async def resume(self) -> None:
        await self._call("POST", "/resume")

    async def check_health(self) -> None:
        await self._call("GET", "/health")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _call(self, method: str, route: str, body: Mapping[str, Any] | None = None) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                headers=self._headers,
                # One connection a request in flight, as many as the hub allows. uvicorn closes a
                # connection that idles for 5 s: let go of it before, so that no request is sent
                # into one that is about to be closed.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),
                cookie_jar=aiohttp.DummyCookieJar(),
                json_serialize_bytes=msgspec.json.encode,
                timeout=aiohttp.ClientTimeout(total=None),  # the hub has its deadlines
            )
        try:
            async with self._session.request(method, self.name + route, json=body) as response:
                answer = await response.read()
                status = response.status
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            raise WorkerFailure(f"{self.name}{route} can't be reached: {error!r}") from error
        if status >= _HTTP_CLIENT_ERROR:
            message = f"{self.name}{route} answered {status}: {_text(answer)[:500]}"
            if status < _HTTP_SERVER_ERROR and status not in _HTTP_NOT_THE_REQUEST:
                raise BadRequest(message)
            raise WorkerFailure(message)
        return answer


def _text(answer: bytes) -> str:
    return answer.decode(errors="replace")


def _completion(choice: _Choice, worker: str) -> Completion:
    count = len(choice.token_ids)
    versions = [-1] * count
    for span in choice.weight_versions:
        if not 0 <= span.start <= span.end <= count:
            raise ValueError(f"span {span.start} … {span.end} of {count} tokens")
        versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
    return Completion(
        token_ids=choice.token_ids,
        logprobs=[entry.logprob for entry in choice.logprobs.content],
        versions=versions,
        finish_reason=choice.finish_reason,
        worker=worker,
    )
