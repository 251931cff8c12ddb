"""The embedded worker's HTTP routes: vLLM's token-in-token-out protocol, over `EmbeddedEngine`.

POST /inference/v1/generate        token ids in; token ids, logprobs, versions out
POST /inference/v1/abort_requests  answer running requests with what they have
POST /pause?mode=keep|abort|wait   freeze; POST /resume goes on
POST /collective_rpc               {"method": "load_flash_weights", "kwargs": {"weights_path"}}
POST /reset_prefix_cache           for vLLM's sake: here a weight load does it
POST /update_weight_version        {"new_version"};  GET /weight_info tells it
GET  /health                       200, or 503 when the engine has died
"""

import asyncio
import hmac
import json
import logging
import os
import signal
import sys
import uuid
from base64 import b64encode
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from flash.routed import packed
from flash.system.listener import Listener, local_address, page_refusal, read_body
from flash.system.machine import raise_open_file_limit
from flash.worker.checksum import checksum
from flash.worker.config import WorkerConfig
from flash.worker.engine import EmbeddedEngine, EngineDied, EngineRequest, EngineResult
from flash.worker.self_test import check_engine

logger = logging.getLogger(__name__)

# As vLLM names its requests internally, and so in abort_requests.
_REQUEST_PREFIX = "generate-tokens-"
_MAX_BODY_BYTES = 64 * 1024 * 1024
_SAMPLING_FIELDS = {"max_tokens", "temperature", "stop_token_ids", "logprobs"}
# What is so here anyway: only what a request names stops it, and an answer comes whole. Texts that
# end an answer are looked for by who asks: a worker knows tokens only.
_SAMPLING_FIELDS |= {"ignore_eos", "stream_interval", "routed_experts_prompt_start", "stop"}

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def make_app(engine: EmbeddedEngine, *, api_key: str, listener: Listener) -> web.Application:
    """The routes over an engine; all but /health ask for the key as bearer token."""
    app = web.Application(
        client_max_size=_MAX_BODY_BYTES, middlewares=[_errors_as_json, _require(api_key, listener)]
    )
    routes = _Routes(engine)
    app.router.add_post("/inference/v1/generate", routes.generate)
    app.router.add_post("/inference/v1/abort_requests", routes.abort_requests)
    app.router.add_post("/pause", routes.pause)
    app.router.add_post("/resume", routes.resume)
    app.router.add_post("/collective_rpc", routes.collective_rpc)
    app.router.add_post("/reset_prefix_cache", routes.reset_prefix_cache)
    app.router.add_post("/update_weight_version", routes.update_weight_version)
    app.router.add_get("/weight_info", routes.weight_info)
    app.router.add_get("/health", routes.health)
    return app


async def serve(config: WorkerConfig, *, on_ready: Callable[[str], None]) -> None:
    """Loads the model and serves until SIGTERM or SIGINT; `on_ready` gets the worker's URL."""
    import torch  # noqa: PLC0415  (the command line's help must not wait for it)

    if config.threads:
        torch.set_num_threads(config.threads)
    cuda = torch.cuda.is_available()
    device = ("cuda" if cuda else "cpu") if config.device == "auto" else config.device
    dtype = (
        ("bfloat16" if device == "cuda" else "float32") if config.dtype == "auto" else config.dtype
    )
    engine = EmbeddedEngine(
        config.model,
        device=device,
        dtype=dtype,
        cache_tokens=config.cache_tokens,
        max_running=config.max_running,
        routed_experts=config.routed_experts,
        version=config.version,
        seed=config.seed,
    )
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    listener = Listener(config.host, config.port)
    try:
        await check_engine(engine)
        app = make_app(engine, api_key=config.api_key, listener=listener)
        on_ready(await listener.start(app))
        await stopped.wait()
    finally:
        engine.close()
        await listener.close()


def main(config: WorkerConfig) -> None:
    """Serve in this process; prints `ready URL` once, and nothing else to stdout."""
    raise_open_file_limit()

    def on_ready(url: str) -> None:
        print(f"ready {url}", flush=True)
        # Whoever waited for that line reads no further, and a full pipe would stop us.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    asyncio.run(serve(config, on_ready=on_ready))


class _Routes:
    def __init__(self, engine: EmbeddedEngine) -> None:
        self._engine = engine

    async def generate(self, request: web.Request) -> web.Response:
        body = await _body(request)
        sampling = _field(body, "sampling_params", dict)
        if unknown := sampling.keys() - _SAMPLING_FIELDS:
            raise web.HTTPBadRequest(
                text=f"sampling_params has {sorted(unknown)}, which this worker can't do; it knows "
                f"{sorted(_SAMPLING_FIELDS)}"
            )
        request_id = str(body.get("request_id") or uuid.uuid4().hex)
        try:
            result = await self._engine.generate(
                EngineRequest(
                    request_id=_REQUEST_PREFIX + request_id,
                    token_ids=_integers(body, "token_ids"),
                    max_tokens=_field(sampling, "max_tokens", int),
                    temperature=_number(sampling, "temperature", 1.0),
                    stop_token_ids=_integers(sampling, "stop_token_ids", []),
                    experts_from=_integer(sampling, "routed_experts_prompt_start", 0),
                )
            )
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        return web.json_response(_generated(request_id, result))

    async def abort_requests(self, request: web.Request) -> web.Response:
        body = await _body(request)
        for request_id in _field(body, "request_ids", list):
            self._engine.abort(str(request_id))
        return web.json_response({})

    async def pause(self, request: web.Request) -> web.Response:
        mode = request.query.get("mode", "abort")
        if mode not in ("keep", "abort", "wait"):
            raise web.HTTPBadRequest(text=f"mode={mode!r} must be keep, abort or wait")
        await self._engine.pause(mode)  # type: ignore[arg-type]  # checked in the line above
        return web.json_response({"status": "paused"})

    async def resume(self, request: web.Request) -> web.Response:
        await self._engine.resume()
        return web.json_response({"status": "resumed"})

    async def collective_rpc(self, request: web.Request) -> web.Response:
        body = await _body(request)
        if body.get("method") == "load_flash_delta":
            return web.json_response({"results": [None]})  # it loads whole weights only
        if body.get("method") != "load_flash_weights":
            raise web.HTTPBadRequest(
                text=f"method={body.get('method')!r}: this worker knows load_flash_weights only"
            )
        path = Path(_field(_field(body, "kwargs", dict), "weights_path", str))
        # In a thread, so that health checks are answered meanwhile; the engine is paused.
        try:
            loaded = await asyncio.to_thread(self._load, path)
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from error
        except OSError as error:  # of this machine, not of the weights
            raise web.HTTPServiceUnavailable(text=str(error)) from error
        return web.json_response({"results": [loaded]})

    def _load(self, path: Path) -> str:
        self._engine.load_weights(path)
        return checksum(path)

    async def reset_prefix_cache(self, request: web.Request) -> web.Response:
        return web.json_response({"success": True})

    async def update_weight_version(self, request: web.Request) -> web.Response:
        body = await _body(request)
        try:
            version = int(body["new_version"])
        except (KeyError, TypeError, ValueError) as error:
            raise web.HTTPBadRequest(text="new_version must be an integer") from error
        self._engine.set_version(version)
        return web.json_response({"version": str(version)})

    async def weight_info(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": str(self._engine.version)})

    async def health(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self._engine.alive else 503)


def _generated(request_id: str, result: EngineResult) -> dict[str, Any]:
    content = [{"logprob": logprob} for logprob in result.logprobs]
    spans = [{"version": str(v), "start": start, "end": end} for v, start, end in result.spans]
    experts = result.experts
    return {
        "request_id": request_id,
        "choices": [
            {
                "index": 0,
                "token_ids": result.token_ids,
                "logprobs": {"content": content},
                "finish_reason": result.finish_reason,
                "weight_versions": spans,
                "routed_experts": None if experts is None else b64encode(packed(experts)).decode(),
            }
        ],
    }


# ── requests ─────────────────────────────────────────────────────────────────────────────────


async def _body(request: web.Request) -> dict[str, Any]:
    try:
        body = json.loads(await read_body(request))
    except ValueError as error:  # no JSON, or no UTF-8
        raise web.HTTPBadRequest(text=f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise web.HTTPBadRequest(text="the body must be a JSON object")
    return body


def _field(body: dict[str, Any], name: str, kind: type) -> Any:
    value = body.get(name)
    if not isinstance(value, kind):
        raise web.HTTPBadRequest(text=f"{name} must be of type {kind.__name__}, not {value!r}")
    return value


def _number(body: dict[str, Any], name: str, default: float) -> float:
    value = body.get(name, default)
    if type(value) not in (int, float):
        raise web.HTTPBadRequest(text=f"{name} must be a number, not {value!r}")
    return float(value)


def _integer(body: dict[str, Any], name: str, default: int) -> int:
    value = body.get(name, default)
    if type(value) is not int:
        raise web.HTTPBadRequest(text=f"{name} must be an integer, not {value!r}")
    return value


def _integers(body: dict[str, Any], name: str, default: list[int] | None = None) -> list[int]:
    value = body.get(name, default)
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise web.HTTPBadRequest(text=f"{name} must be a list of integers")
    return value


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return web.json_response({"error": {"message": error.text}}, status=error.status)
    except EngineDied as error:
        return web.json_response({"error": {"message": str(error)}}, status=500)


def _require(api_key: str, listener: Listener) -> Any:
    wanted = f"Bearer {api_key}".encode()

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if why := page_refusal(request.headers, local_address=local_address(request)):
            raise web.HTTPForbidden(text=why)
        given = request.headers.get("Authorization", "").encode(errors="replace")
        if hmac.compare_digest(given, wanted):
            listener.vouch(request)
        elif request.path != "/health":
            raise web.HTTPUnauthorized(
                text="the worker's API key is missing or wrong: send what was in its "
                "$FLASH_WORKER_API_KEY, or what it told at its start (engine.api_key)"
            )
        return await handler(request)

    return middleware
