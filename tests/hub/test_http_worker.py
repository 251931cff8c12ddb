"""The HTTP client of the worker protocol, against a server that answers what it is told."""

from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from flash.hub import BadRequest, HttpWorker, WorkerFailure
from flash.types import SamplingParams

SAMPLING = SamplingParams(max_tokens=3, temperature=0.5, stop_token_ids=(9,))
GOOD = {
    "choices": [
        {
            "token_ids": [7, 8, 9],
            "logprobs": {"content": [{"logprob": -1.0}, {"logprob": -2.0}, {"logprob": -3.0}]},
            "finish_reason": "stop",
            "weight_versions": [
                {"version": "4", "start": 0, "end": 2},
                {"version": "5", "start": 2, "end": 3},
            ],
        }
    ]
}


class Scripted:
    """Keeps what it was asked, answers `status` and `answer`."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, object]] = []
        self.status = 200
        self.answer: object = GOOD
        self.authorization = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.asked.append((request.method, request.path_qs, body))
        self.authorization = request.headers.get("Authorization", "")
        if isinstance(self.answer, str):
            return web.Response(text=self.answer, status=self.status)
        return web.json_response(self.answer, status=self.status)


@pytest.fixture
async def scripted():
    script = Scripted()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", script.handle)
    async with TestServer(app) as server:
        script.worker = HttpWorker(str(server.make_url("/")), api_key="key")
        yield script
        await script.worker.close()


async def test_a_request_and_its_answer_in_the_protocols_words(scripted):
    completion = await scripted.worker.generate("id", [1, 2], SAMPLING)
    assert scripted.asked == [
        (
            "POST",
            "/inference/v1/generate",
            {
                "request_id": "id",
                "token_ids": [1, 2],
                "sampling_params": {
                    "max_tokens": 3, "temperature": 0.5, "stop_token_ids": [9], "logprobs": 0,
                },
            },
        )
    ]  # fmt: skip
    assert completion.token_ids == [7, 8, 9]
    assert completion.logprobs == [-1.0, -2.0, -3.0]
    assert completion.versions == [4, 4, 5]
    assert completion.finish_reason == "stop"
    assert scripted.authorization == "Bearer key"


async def test_the_control_routes(scripted):
    scripted.answer = {}
    await scripted.worker.abort("id")
    await scripted.worker.pause("keep")
    await scripted.worker.load_weights(Path("/weights/1"))
    await scripted.worker.set_version(1)
    await scripted.worker.resume()
    await scripted.worker.check_health()
    load = {"method": "reload_weights", "kwargs": {"weights_path": "/weights/1"}}
    assert scripted.asked == [
        ("POST", "/inference/v1/abort_requests", {"request_ids": ["generate-tokens-id"]}),
        ("POST", "/pause?mode=keep", None),
        ("POST", "/collective_rpc", load),
        ("POST", "/update_weight_version", {"new_version": "1"}),
        ("POST", "/resume", None),
        ("GET", "/health", None),
    ]


@pytest.mark.parametrize(
    ("status", "answer", "error"),
    [
        (400, {"error": "max_tokens"}, BadRequest),
        (422, "no", BadRequest),
        (401, "key", WorkerFailure),
        (404, "route", WorkerFailure),
        (429, "busy", WorkerFailure),
        (500, "died", WorkerFailure),
        (503, "loading", WorkerFailure),
        (200, "not json", WorkerFailure),
        (200, {"choices": []}, WorkerFailure),
        (200, {"choices": [{"token_ids": [1]}]}, WorkerFailure),
        (200, ["list"], WorkerFailure),
    ],
)
async def test_a_mistake_of_the_request_is_told_from_a_failing_worker(
    scripted, status, answer, error
):
    scripted.status, scripted.answer = status, answer
    with pytest.raises(error):
        await scripted.worker.generate("id", [1], SAMPLING)


async def test_a_worker_that_is_not_there_has_failed():
    worker = HttpWorker("http://127.0.0.1:9")
    with pytest.raises(WorkerFailure, match="can't be reached"):
        await worker.check_health()
    await worker.close()
