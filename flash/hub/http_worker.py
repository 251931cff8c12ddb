"""A worker behind vLLM's token-in-token-out HTTP protocol: a vLLM server or the embedded worker."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from flash.hub.worker import BadRequest, OnTokens, WorkerFailure
from flash.system.shortage import when_there_is_room
from flash.types import Completion, FinishReason, SamplingParams, UpdateMode
from flash.worker.checksum import checksum

# vLLM puts it before the client's request_id, and abort_requests wants it there.
_REQUEST_PREFIX = "generate-tokens-"
_GENERATE = "/inference/v1/generate"
# A stream costs this process twice the CPU of a whole answer, and vLLM 8% of its speed, with 64
# tokens in chunks of 16. So it is for answers that are worth keeping when their worker dies.
STREAMED_FROM_TOKENS, _STREAM_INTERVAL = 128, 32
_LONGEST_LINE_BYTES = 1 << 20
_DATA, _DONE = b"data: ", b"data: [DONE]"
# vLLM sends this for a logprob that is nan.
_CLAMPED_LOGPROB = -9000.0
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
    """A whole answer, or a chunk of a stream; the last chunk has reason and versions."""

    token_ids: list[int]
    logprobs: _Logprobs | None
    finish_reason: FinishReason | None
    weight_versions: list[_Span] | None

    def numbers(self) -> list[float]:
        """The logprobs; ValueError for one that stands for nan."""
        entries = self.logprobs.content if self.logprobs is not None else []
        logprobs = [entry.logprob for entry in entries]
        if logprobs and min(logprobs) < _CLAMPED_LOGPROB:
            raise ValueError("a logprob is nan")
        return logprobs


class _Answer(msgspec.Struct, gc=False):
    """What is read of an answer. Its other fields (vLLM repeats each logprob) become no objects,
    which costs a ninth of json.loads, and leaves the garbage collector nothing to walk through."""

    choices: list[_Choice]


class _Loaded(msgspec.Struct):
    """What the ranks of a worker say of the weights that they loaded."""

    results: list[str]


decode_answer = msgspec.json.Decoder(_Answer).decode
_decode_loaded = msgspec.json.Decoder(_Loaded).decode


class HttpWorker:
    """Client of one worker at `url`. Deadlines are the caller's."""

    def __init__(self, url: str, *, api_key: str = "") -> None:
        self.name = url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        params = {
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "stop_token_ids": list(sampling.stop_token_ids),
            "ignore_eos": True,  # a request says where it stops, all of it
            "logprobs": 0,
        }
        body: dict[str, Any] = {
            "request_id": request_id,
            "token_ids": list(token_ids),
            "sampling_params": params,
        }
        if on_tokens is not None and sampling.max_tokens >= STREAMED_FROM_TOKENS:
            params["stream_interval"] = _STREAM_INTERVAL
            body["stream"] = True
            return await self._stream(body, sampling, on_tokens)
        answer = await self._call("POST", _GENERATE, body)
        with self._readable(answer):
            choice = decode_answer(answer).choices[0]
            return self._completion(choice, choice.token_ids, choice.numbers(), sampling)

    async def abort(self, request_id: str) -> None:
        body = {"request_ids": [_REQUEST_PREFIX + request_id]}
        await self._call("POST", "/inference/v1/abort_requests", body)

    async def pause(self, mode: UpdateMode) -> None:
        await self._call("POST", f"/pause?mode={mode}")

    async def load_weights(self, path: Path) -> None:
        body = {"method": "load_flash_weights", "kwargs": {"weights_path": str(path)}}
        try:
            answer = await self._call("POST", "/collective_rpc", body)
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
        await self._forget_keys_and_values()

    async def set_version(self, version: int) -> None:
        await self._call("POST", "/update_weight_version", {"new_version": str(version)})

    async def resume(self) -> None:
        await self._call("POST", "/resume")

    async def check_health(self) -> None:
        await self._call("GET", "/health")

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _forget_keys_and_values(self) -> None:
        """Those of the old weights serve nobody: what runs is computed anew, so that every token
        is sampled by one version alone."""
        await self._call("POST", "/reset_prefix_cache?reset_running_requests=true")

    async def _call(self, method: str, route: str, body: Mapping[str, Any] | None = None) -> bytes:
        async with self._request(method, route, body) as response:
            return await response.read()

    async def _stream(
        self, body: Mapping[str, Any], sampling: SamplingParams, on_tokens: OnTokens
    ) -> Completion:
        """An answer in chunks; a worker that does not stream sends it whole."""
        token_ids: list[int] = []
        logprobs: list[float] = []
        async with self._request("POST", _GENERATE, body) as response:
            streams = response.content_type == "text/event-stream"
            lines = _events(response) if streams else _whole(response)
            async for line in lines:
                with self._readable(line):
                    choice = decode_answer(line).choices[0]
                    numbers = choice.numbers()
                token_ids += choice.token_ids
                logprobs += numbers
                if streams:
                    on_tokens(choice.token_ids, numbers)
                if choice.finish_reason is not None:
                    with self._readable(line):
                        return self._completion(choice, token_ids, logprobs, sampling)
        raise WorkerFailure(f"{self.name}{_GENERATE} ended its answer before it was complete")

    def _completion(
        self,
        last: _Choice,
        token_ids: list[int],
        logprobs: list[float],
        sampling: SamplingParams,
    ) -> Completion:
        """From all tokens and the chunk that came last; ValueError if they can't be."""
        if last.finish_reason is None:
            raise ValueError("an answer without finish_reason")
        count = len(token_ids)
        versions = [-1] * count
        for span in last.weight_versions or ():
            if not 0 <= span.start <= span.end <= count:
                raise ValueError(f"span {span.start} … {span.end} of {count} tokens")
            versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
        return Completion(
            token_ids=token_ids,
            logprobs=logprobs,
            versions=versions,
            temperature=sampling.temperature,
            finish_reason=last.finish_reason,
            worker=self.name,
        )

    @contextlib.asynccontextmanager
    async def _request(
        self, method: str, route: str, body: Mapping[str, Any] | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """A response with a good status; a connection that breaks inside is a WorkerFailure."""
        session = self._session
        if session is None:
            session = self._session = aiohttp.ClientSession(
                headers=self.headers,
                # One connection a request in flight, as many as the hub allows. uvicorn closes a
                # connection that idles for 5 s: let go of it before, so that no request is sent
                # into one that is about to be closed.
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0),
                cookie_jar=aiohttp.DummyCookieJar(),
                json_serialize_bytes=msgspec.json.encode,
                timeout=aiohttp.ClientTimeout(total=None),  # the hub has its deadlines
                read_bufsize=_LONGEST_LINE_BYTES,
            )
        try:
            # A socket that this machine has not is no failure of the worker's.
            response = await when_there_is_room(
                lambda: session.request(method, self.name + route, json=body)
            )
            async with response:
                status = response.status
                if status >= _HTTP_CLIENT_ERROR:
                    message = f"{self.name}{route} answered {status}: "
                    message += _text(await response.read())[:500]
                    if status < _HTTP_SERVER_ERROR and status not in _HTTP_NOT_THE_REQUEST:
                        raise BadRequest(message)
                    raise WorkerFailure(message)
                yield response
        except (aiohttp.ClientError, OSError, asyncio.IncompleteReadError) as error:
            why = str(error) or repr(error)
            raise WorkerFailure(f"{self.name}{route} can't be reached: {why}") from error

    @contextlib.contextmanager
    def _readable(self, answer: bytes) -> Iterator[None]:
        """What fails inside is the answer's fault, which is not of this protocol."""
        try:
            yield
        except (IndexError, ValueError) as error:  # msgspec's errors are ValueErrors
            raise WorkerFailure(
                f"{self.name} sent an answer that is not of this protocol ({error!r}): "
                f"{_text(answer)[:300]}"
            ) from error


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """The data of server-sent events."""
    try:
        async for line in response.content:
            if line.startswith(_DATA) and not line.startswith(_DONE):
                yield line[len(_DATA) :]
    except ValueError as error:
        raise aiohttp.ClientPayloadError("a line of the stream is too long") from error


async def _whole(response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    yield await response.read()


def _text(answer: bytes) -> str:
    return answer.decode(errors="replace")
