"""The HTTP client of the worker protocol, against a server that answers what it is told."""

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from flash.hub.http_worker import HttpWorker
from flash.hub.worker import BadRequest, WorkerFailure
from flash.types import SamplingParams
from flash.worker.checksum import checksum

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


def changed(**fields) -> dict:
    """The good answer but for these fields."""
    return {"choices": [GOOD["choices"][0] | fields]}


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
        if isinstance(self.answer, bytes):
            return web.Response(body=self.answer, content_type="application/json")
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
                    "max_tokens": 3, "temperature": 0.5, "stop_token_ids": [9], "ignore_eos": True,
                    "logprobs": 0,
                },
            },
        )
    ]  # fmt: skip
    assert completion.token_ids == [7, 8, 9]
    assert completion.logprobs == [-1.0, -2.0, -3.0]
    assert completion.versions == [4, 4, 5]
    assert completion.finish_reason == "stop"
    assert completion.temperature == 0.5
    assert scripted.authorization == "Bearer key"


async def test_the_control_routes(scripted, tmp_path):
    scripted.answer = {"results": [checksum(tmp_path)]}
    await scripted.worker.abort("id")
    await scripted.worker.pause("keep")
    await scripted.worker.load_weights(tmp_path)
    await scripted.worker.set_version(1)
    await scripted.worker.resume()
    await scripted.worker.check_health()
    load = {"method": "load_flash_weights", "kwargs": {"weights_path": str(tmp_path)}}
    assert scripted.asked == [
        ("POST", "/inference/v1/abort_requests", {"request_ids": ["generate-tokens-id"]}),
        ("POST", "/pause?mode=keep", None),
        ("POST", "/collective_rpc", load),
        ("POST", "/reset_prefix_cache?reset_running_requests=true", None),
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
        (200, b"\xff\xfe not UTF-8", WorkerFailure),
        (200, changed(finish_reason=None), WorkerFailure),
        (200, changed(weight_versions=[{"version": "4", "start": 0, "end": 4}]), WorkerFailure),
        (200, changed(weight_versions=[{"version": "4", "start": -1, "end": 3}]), WorkerFailure),
        (
            200,
            changed(weight_versions=[{"version": "default", "start": 0, "end": 3}]),
            WorkerFailure,
        ),
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
    with pytest.raises(
        WorkerFailure, match=r"can't be reached: Cannot connect to host 127\.0\.0\.1"
    ):
        await worker.check_health()
    await worker.close()


async def test_a_worker_that_hangs_up_in_the_middle_has_failed():
    async def hang_up(request: web.Request) -> web.StreamResponse:
        request.transport.close()
        return web.Response()

    app = web.Application()
    app.router.add_post("/inference/v1/generate", hang_up)
    async with TestServer(app) as server:
        worker = HttpWorker(str(server.make_url("/")))
        with pytest.raises(WorkerFailure, match="can't be reached"):
            await worker.generate("id", [1], SAMPLING)
        await worker.close()


async def test_tokens_that_no_span_covers_have_no_version(scripted):
    """The hub then refuses the answer: -1 was never published."""
    scripted.answer = changed(weight_versions=[{"version": "4", "start": 0, "end": 2}])
    assert (await scripted.worker.generate("id", [1], SAMPLING)).versions == [4, 4, -1]


async def test_weights_that_a_server_can_not_load_say_what_it_must_have(scripted, tmp_path):
    scripted.status, scripted.answer = 500, {"error": "Worker failed with error ''"}
    with pytest.raises(
        WorkerFailure, match=r"500: .* \(it must serve the model that is trained, and"
    ):
        await scripted.worker.load_weights(tmp_path)
