"""An SGLang server without a model: its native routes, and what they insist on, over a worker.

It does as SGLang 0.5.23 does (srt/managers/io_struct.py, srt/managers/tokenizer_manager.py,
srt/managers/scheduler.py). The worker may be a fake one, or the client of a real one:

    server = FakeSglang(FakeWorker("worker"))      its `app()` is to be served
    SglangWorker(url)                              its client
"""

import asyncio
import base64
import contextlib
import itertools
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from aiohttp import web

from flash.fakes.sglang_group import (
    Begin,
    DestroyGroup,
    Distributed,
    End,
    InitGroup,
    Ranks,
    Refused,
)
from flash.fakes.worker import FakeWorker
from flash.hub.worker import Worker, WorkerFailure
from flash.types import Completion, SamplingParams, Weights

_Request = TypeVar("_Request")
Answer = dict[str, Any]

_MOST_BYTES = 1 << 26  # of a body

_NOT_FLUSHED = (
    "Weights were updated, but the cache was not flushed because requests are still running or "
    "queued."
)


class _Sampling(msgspec.Struct, forbid_unknown_fields=True):
    max_new_tokens: int = 128
    temperature: float = 1.0
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    stream_interval: int | None = None


class _Generate(msgspec.Struct, forbid_unknown_fields=True):
    rid: str
    input_ids: list[int]
    sampling_params: _Sampling
    return_logprob: bool = False
    cache_salt: str | None = None
    stream: bool = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0


class _Pause(msgspec.Struct, forbid_unknown_fields=True):
    mode: Literal["abort", "retract", "in_place"] = "abort"


class _Continue(msgspec.Struct, forbid_unknown_fields=True):
    torch_empty_cache: bool = True


class _Update(msgspec.Struct, forbid_unknown_fields=True):
    model_path: str
    load_format: str | None = None
    flush_cache: bool = True
    weight_version: str | None = None


class _Version(msgspec.Struct, forbid_unknown_fields=True):
    new_version: str
    abort_all_requests: bool = True


class _Abort(msgspec.Struct, forbid_unknown_fields=True):
    rid: str = ""
    abort_all: bool = False


class _Memory(msgspec.Struct, forbid_unknown_fields=True):
    tags: list[Literal["weights", "kv_cache"]]


class _Live:
    """A request that it has: what was told of it, and whether it is lost with the queue."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.queued_and_aborted = False


class FakeSglang:
    """
    Args:
        worker: what samples.
        api_key: is asked for at every route but /health.
        incremental: --incremental-streaming-output.
        overlap: false is --disable-overlap-schedule.
        eos_token_ids: the model's own, at which it stops unless it is told to ignore them.
        context_length: the longest sequence, as /v1/models tells it.
        tp_size: ranks that get weights from a group.

    `asked`: routes and bodies, in order. `ranks` get weights from a group. `changes` are made to
    the next answers or events; `cut_after` so many events of the next stream the connection ends,
    -1: never; `load_error`: what loads of weights from files fail with.
    """

    def __init__(
        self,
        worker: Worker,
        *,
        api_key: str = "",
        incremental: bool = True,
        overlap: bool = True,
        eos_token_ids: tuple[int, ...] = (),
        context_length: int = 1 << 20,
        tp_size: int = 1,
    ) -> None:
        self.worker = worker
        self.asked: list[tuple[str, Any]] = []
        self.changes: list[Callable[[Answer], None]] = []
        self.cut_after = -1
        self.load_error = ""
        self.ranks = Ranks(tp_size)
        self._api_key = api_key
        self._incremental = incremental
        self._overlap = overlap
        self._eos_token_ids = eos_token_ids
        self._context_length = context_length
        self._live: dict[str, _Live] = {}
        self._version = "default"
        self._taking = True  # new requests: not while generation is paused
        self._engine: Literal["runs", "retract", "in_place"] = "runs"
        self._writers = 0
        self._to_abort: list[str] = []  # once the engine runs again
        self._wakes = False
        self._changed = asyncio.Condition()

    def app(self) -> web.Application:
        """To be served."""
        app = web.Application(middlewares=[self._guard], client_max_size=_MOST_BYTES)
        for route, answer in {
            "/generate": self._generate,
            "/abort_request": self._abort_request,
            "/pause_generation": self._pause_generation,
            "/continue_generation": self._continue_generation,
            "/update_weights_from_disk": self._update_weights_from_disk,
            "/init_weights_update_group": self._init_group,
            "/destroy_weights_update_group": self._destroy_group,
            "/begin_weight_update": self._begin_update,
            "/update_weights_from_distributed": self._update_weights_from_distributed,
            "/end_weight_update": self._end_update,
            "/update_weight_version": self._update_weight_version,
            "/release_memory_occupation": self._release_memory,
            "/resume_memory_occupation": self._resume_memory,
        }.items():
            app.router.add_post(route, answer)
        app.router.add_get("/server_info", self._server_info)
        app.router.add_get("/model_info", self._model_info)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/health", self._health)
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        body = await request.read()
        self.asked.append((request.path, msgspec.json.decode(body) if body else None))
        is_open = not self._api_key or request.path == "/health"
        if not is_open and request.headers.get("Authorization") != f"Bearer {self._api_key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        try:
            return await handler(request)
        except Refused as refusal:
            return web.json_response({"success": False, "message": str(refusal)}, status=400)
        except (ValueError, WorkerFailure) as error:
            status = 500 if isinstance(error, WorkerFailure) else 400
            return web.json_response({"error": {"message": str(error)}}, status=status)

    # ── requests ─────────────────────────────────────────────────────────────────────────────

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        asked = await _body(request, _Generate)
        if asked.rid in self._live:
            raise ValueError(f"Duplicate request ID detected: {asked.rid}")
        self._live[asked.rid] = live = _Live()
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: self._taking and not self._writers)
            if asked.stream:
                return await self._answer_in_events(request, asked, live)
            completion = await self._sample(asked, live, on_tokens=None)
            return web.json_response(self._changed_answer(self._answer(asked, completion, 0)))
        finally:
            async with self._changed:
                del self._live[asked.rid]
                self._changed.notify_all()

    async def _sample(
        self, asked: _Generate, live: _Live, on_tokens: Callable[[], None] | None
    ) -> Completion:
        wanted = asked.sampling_params
        ends: tuple[int, ...] = ()
        if not wanted.ignore_eos:  # which is of stop_token_ids too
            ends = (*(wanted.stop_token_ids or ()), *self._eos_token_ids)

        def told(token_ids: Any, logprobs: Any) -> None:
            live.token_ids += token_ids
            live.logprobs += logprobs
            assert on_tokens is not None
            on_tokens()

        completion = await self.worker.generate(
            asked.rid,
            asked.input_ids,
            SamplingParams(
                max_tokens=wanted.max_new_tokens,
                temperature=wanted.temperature,
                stop_token_ids=ends,
                experts_from=asked.routed_experts_start_len
                if asked.return_routed_experts
                else None,
            ),
            told if on_tokens is not None else None,
        )
        if live.queued_and_aborted:  # all that its queue had to tell was told before
            kept = len(live.token_ids)
            for told_of in (completion.token_ids, completion.logprobs, completion.versions):
                del told_of[kept:]
        return completion

    async def _answer_in_events(
        self, request: web.Request, asked: _Generate, live: _Live
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        more = asyncio.Event()
        sampling = asyncio.create_task(self._sample(asked, live, more.set), name=asked.rid)
        sampling.add_done_callback(lambda _: more.set())
        said = 0
        try:
            for number in itertools.count():
                await more.wait()
                more.clear()
                if number == self.cut_after:
                    self.cut_after = -1
                    assert request.transport is not None
                    request.transport.abort()
                if sampling.done():
                    answer = self._answer(asked, sampling.result(), said)
                else:
                    answer = self._event(asked, live.token_ids, live.logprobs, said)
                said = answer["meta_info"]["completion_tokens"]
                event = msgspec.json.encode(self._changed_answer(answer))
                await response.write(b"data: " + event + b"\n\n")
                if sampling.done():
                    break
        finally:
            sampling.cancel()
        await response.write(b"data: [DONE]\n\n")
        return response

    def _event(
        self, asked: _Generate, token_ids: list[int], logprobs: list[float], said: int
    ) -> Answer:
        """What there is, or in a stream of segments what is new."""
        start = said if asked.stream and self._incremental else 0
        meta: Answer = {
            "id": asked.rid,
            "finish_reason": None,
            "prompt_tokens": len(asked.input_ids),
            "weight_version": self._version,
            "num_retractions": 0,
            "completion_tokens": len(token_ids),
            "cached_tokens": 0,
        }
        if asked.return_logprob:
            entries = [[p, t, None] for p, t in zip(logprobs, token_ids, strict=True)]
            meta |= {"input_token_logprobs": [], "output_token_logprobs": entries[start:]}
        return {"text": "", "output_ids": token_ids[start:], "meta_info": meta}

    def _answer(self, asked: _Generate, completion: Completion, said: int) -> Answer:
        """The last event, or the whole answer."""
        answer = self._event(asked, completion.token_ids, completion.logprobs, said)
        spans, end = [], 0
        for version, tokens in itertools.groupby(completion.versions):
            start, end = end, end + len(list(tokens))
            spans.append({"version": str(version), "start": start, "end": end})
        reason: Answer = {"type": completion.finish_reason}
        if completion.finish_reason == "stop":
            reason["matched"] = completion.token_ids[-1]
        elif completion.finish_reason == "length":
            reason["length"] = asked.sampling_params.max_new_tokens
        else:
            reason |= {"message": "Aborted", "status_code": None, "err_type": None}
        answer["meta_info"] |= {"finish_reason": reason, "weight_versions": spans}
        if completion.experts is not None:
            flat = completion.experts.astype("<i4").tobytes()
            answer["meta_info"]["routed_experts"] = base64.b64encode(flat).decode()
        return answer

    def _changed_answer(self, answer: Answer) -> Answer:
        if self.changes:
            self.changes.pop(0)(answer)
        return answer

    async def _abort_request(self, request: web.Request) -> web.Response:
        asked = await _body(request, _Abort)
        if asked.abort_all:
            await self._abort("")
        elif asked.rid in self._live:
            await self._abort(asked.rid)
        return web.Response()

    async def _abort(self, beginning: str) -> None:
        """All whose ids begin so; those that are frozen in place end once they go on."""
        rids = [rid for rid in self._live if rid.startswith(beginning)]
        if self._engine == "in_place":
            self._to_abort += rids
            return
        for rid in rids:
            self._live[rid].queued_and_aborted |= self._engine == "retract"
            await self.worker.abort(rid)

    # ── pauses and weights ───────────────────────────────────────────────────────────────────

    async def _pause_generation(self, request: web.Request) -> web.Response:
        mode = (await _body(request, _Pause)).mode
        self._taking = False
        if mode == "abort":
            await self._abort("")
            async with self._changed:
                await self._changed.wait_for(lambda: not self._live)
        else:
            self._engine = mode
            await self.worker.pause("keep" if mode == "retract" else "keep_stale_kv")
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue_generation(self, request: web.Request) -> web.Response:
        await _body(request, _Continue)
        await (self.worker.wake_rest() if self._wakes else self.worker.resume())
        self._wakes = False
        self._engine = "runs"
        for rid in self._to_abort:
            await self.worker.abort(rid)
        self._to_abort.clear()
        async with self._changed:
            self._taking = True
            self._changed.notify_all()
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def _update_weights_from_disk(self, request: web.Request) -> web.Response:
        asked = await _body(request, _Update)
        async with self._still():
            await self._update(asked)
        return _done(num_paused_requests=0)

    def _still(self) -> AbstractAsyncContextManager[None]:
        """Nobody samples in the block, because generation is paused or by waiting for it."""
        return self._alone() if self._taking else contextlib.nullcontext()

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Once those that run have ended; no other begins meanwhile."""
        async with self._changed:
            self._writers += 1
            try:
                await self._changed.wait_for(lambda: not self._live)
                yield
            finally:
                self._writers -= 1
                self._changed.notify_all()

    async def _update(self, asked: _Update) -> None:
        path = Path(asked.model_path)
        if self.load_error or not any(path.glob("*.safetensors")):
            why = self.load_error or f"Cannot find any model weights with `{path}`"
            raise Refused(f"Failed to update weights: {why}.\nRolling back to original weights.")
        version = int(asked.weight_version or -1)
        await self.worker.load_weights(Weights(version=version, path=path))
        if asked.weight_version is not None:
            await self._set_version(asked.weight_version)
        if asked.flush_cache:
            await self._flush()

    async def _flush(self) -> None:
        if self._live and self._engine != "retract":
            raise Refused(_NOT_FLUSHED)
        await self.worker.recompute()

    async def _init_group(self, request: web.Request) -> web.Response:
        await self.ranks.init(await _body(request, InitGroup))
        return _done()

    async def _destroy_group(self, request: web.Request) -> web.Response:
        self.ranks.destroy(await _body(request, DestroyGroup))
        return _done()

    async def _begin_update(self, request: web.Request) -> web.Response:
        await _body(request, Begin)
        async with self._still():
            self.ranks.begin()
        return _done()

    async def _update_weights_from_distributed(self, request: web.Request) -> web.Response:
        asked = await _body(request, Distributed)
        async with self._still():
            await self.ranks.receive(asked)
            if asked.flush_cache:
                await self._flush()
        return _done()

    async def _end_update(self, request: web.Request) -> web.Response:
        await _body(request, End)
        async with self._still():
            with tempfile.TemporaryDirectory() as folder:
                self.ranks.end(Path(folder))
                weights = Weights(version=-1, path=Path(folder))
                await self.worker.load_weights(weights)
        return _done()

    async def _update_weight_version(self, request: web.Request) -> web.Response:
        asked = await _body(request, _Version)
        if asked.abort_all_requests:
            await self._abort("")
        await self._set_version(asked.new_version)
        return web.json_response({"success": True, "new_version": asked.new_version})

    async def _set_version(self, version: str) -> None:
        self._version = version
        await self.worker.set_version(int(version))

    async def _release_memory(self, request: web.Request) -> web.Response:
        asked = await _body(request, _Memory)
        if self._live and self._engine != "retract":
            raise WorkerFailure("it should be called only when server is idle")
        assert set(asked.tags) == {"weights", "kv_cache"}, "a fake worker sleeps altogether"
        await self.worker.sleep("keep")
        return web.json_response(None)

    async def _resume_memory(self, request: web.Request) -> web.Response:
        tags = (await _body(request, _Memory)).tags
        if "weights" in tags:
            await self.worker.wake_weights()
        self._wakes |= "kv_cache" in tags
        return web.json_response(None)

    def restart(self) -> None:
        """As its pool does, over a fake worker: all that it knew is gone."""
        assert isinstance(self.worker, FakeWorker)
        self.worker.restart(version=-7)
        self._version = "default"
        self.ranks.restart()

    # ── what it tells ────────────────────────────────────────────────────────────────────────

    async def _server_info(self, request: web.Request) -> web.Response:
        await self.worker.check_health()
        info = {
            "version": "0.5.23",
            "disable_overlap_schedule": not self._overlap,
            "tp_size": self.ranks.size,
            "pp_size": 1,
            "dp_size": 1,
        }
        return web.json_response(info)

    async def _model_info(self, request: web.Request) -> web.Response:
        """Its tokenizer's process knows that, whatever its ranks are at."""
        return web.json_response({"weight_version": self._version})

    async def _models(self, request: web.Request) -> web.Response:
        card = {"id": "model", "object": "model", "max_model_len": self._context_length}
        return web.json_response({"object": "list", "data": [card]})

    async def _health(self, request: web.Request) -> web.Response:
        await self.worker.check_health()
        return web.Response()


def _done(**more: int) -> web.Response:
    return web.json_response({"success": True, "message": "Success", **more})


async def _body(request: web.Request, kind: type[_Request]) -> _Request:
    """ValueError for what the route does not know."""
    return msgspec.json.decode(await request.read(), type=kind)
