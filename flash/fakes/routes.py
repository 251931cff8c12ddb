"""The worker protocol's routes over a fake worker."""

import base64
import itertools
from pathlib import Path
from typing import Any

from aiohttp import web

from flash.fakes.worker import FakeWorker
from flash.hub.worker import WorkerFailure
from flash.routed import packed
from flash.types import SamplingParams, Weights
from flash.worker.checksum import checksum


def worker_app(worker: FakeWorker) -> web.Application:
    """The worker protocol's routes over a fake worker, for tests of the HTTP client."""

    async def generate(request: web.Request) -> web.Response:
        body = await request.json()
        asked = body["sampling_params"]
        sampling = SamplingParams(
            max_tokens=asked["max_tokens"],
            temperature=asked["temperature"],
            stop_token_ids=tuple(asked["stop_token_ids"]),
            stop=tuple(asked.get("stop", ())),
            constraint=asked.get("structured_outputs", {}).get("structural_tag"),
            experts_from=asked.get("routed_experts_prompt_start"),
        )
        request_id = "generate-tokens-" + body["request_id"]
        answer = await worker.generate(request_id, body["token_ids"], sampling)
        spans, end = [], 0
        for version, tokens in itertools.groupby(answer.versions):
            start, end = end, end + len(list(tokens))
            spans.append({"version": str(version), "start": start, "end": end})
        choice = {
            "token_ids": answer.token_ids,
            "logprobs": {"content": [{"logprob": logprob} for logprob in answer.logprobs]},
            "finish_reason": answer.finish_reason,
            "weight_versions": spans,
        }
        if answer.experts is not None:
            choice["routed_experts"] = base64.b64encode(packed(answer.experts)).decode()
        return web.json_response({"choices": [choice]})

    async def abort_requests(request: web.Request) -> web.Response:
        for request_id in (await request.json())["request_ids"]:
            await worker.abort(request_id)
        return web.json_response({})

    async def pause(request: web.Request) -> web.Response:
        await worker.pause(request.query["mode"])  # type: ignore[arg-type]  # a test's own words
        return web.json_response({})

    async def resume(request: web.Request) -> web.Response:
        await worker.resume()
        return web.json_response({})

    async def sleep(request: web.Request) -> web.Response:
        assert request.query["level"] == "2"
        await worker.sleep(request.query["mode"])  # type: ignore[arg-type]
        return web.json_response({"status": "sleeping"})

    async def wake_up(request: web.Request) -> web.Response:
        wake = {"weights": worker.wake_weights, "kv_cache": worker.wake_rest}
        await wake[request.query["tags"]]()
        return web.json_response({"status": "awake"})

    async def collective_rpc(request: web.Request) -> web.Response:
        body = await request.json()
        if body["method"] == "load_flash_delta":
            return web.json_response({"results": [None]})  # as the embedded worker
        assert body["method"] == "load_flash_weights"
        path = Path(body["kwargs"]["weights_path"])
        await worker.load_weights(Weights(version=worker.version, path=path))
        return web.json_response({"results": [checksum(path)]})

    async def reset_prefix_cache(request: web.Request) -> web.Response:
        await worker.recompute()
        return web.json_response({"success": True})

    async def update_weight_version(request: web.Request) -> web.Response:
        await worker.set_version(int((await request.json())["new_version"]))
        return web.json_response({})

    async def weight_info(request: web.Request) -> web.Response:
        return web.json_response({"weight_version": str(worker.version)})

    async def health(request: web.Request) -> web.Response:
        await worker.check_health()
        return web.Response()

    @web.middleware
    async def failing(request: web.Request, handler: Any) -> web.StreamResponse:
        try:
            response: web.StreamResponse = await handler(request)
        except WorkerFailure as error:
            return web.json_response({"error": {"message": str(error)}}, status=500)
        return response

    app = web.Application(middlewares=[failing])
    posted = {
        "/inference/v1/generate": generate,
        "/inference/v1/abort_requests": abort_requests,
        "/pause": pause,
        "/resume": resume,
        "/sleep": sleep,
        "/wake_up": wake_up,
        "/collective_rpc": collective_rpc,
        "/reset_prefix_cache": reset_prefix_cache,
        "/update_weight_version": update_weight_version,
    }
    for route, handler in posted.items():
        app.router.add_post(route, handler)
    app.router.add_get("/weight_info", weight_info)
    app.router.add_get("/health", health)
    return app
