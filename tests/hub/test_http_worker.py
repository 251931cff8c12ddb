"""The HTTP client of the worker protocol, against a server that answers what it is told."""

import base64
import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from safetensors.numpy import save_file

from flash.hub.answers import TokenStream
from flash.hub.http_worker import HttpWorker
from flash.hub.worker import BadRequest, WorkerFailure
from flash.routed import packed
from flash.types import Completion, SamplingParams, Weights
from flash.worker.checksum import checksum
from flash.worker.delta import Delta, TensorInfo, file_in
from tests.hub.raw_server import answer, chunked, raw_server

EVENTS = ("Content-Type: text/event-stream; charset=utf-8",)

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


def test_a_line_may_be_as_long_as_the_experts_of_all_tokens():
    """Of 94 layers and 8 of each, as int32 in base64."""
    tokens = 2000
    stream = TokenStream("w", lambda *_: None, tokens=tokens)
    stream.feed(b"data: " + b"x" * (tokens * 94 * 8 * 4 * 4 // 3))
    with pytest.raises(WorkerFailure, match="too long"):
        stream.feed(b"x" * (1 << 24))


async def test_a_constraint_and_texts_that_end_an_answer_in_vllms_words(scripted):
    asked = replace(SAMPLING, constraint='{"type": "structural_tag"}', stop=("a", "b"))
    await scripted.worker.generate("id", [1, 2], asked)
    body = scripted.asked[0][2]
    assert (body["reasoning_ended"], body["sampling_params"]["ignore_eos"]) == (True, False)
    assert body["sampling_params"]["stop"] == ["a", "b"]
    assert body["sampling_params"]["structured_outputs"] == {
        "structural_tag": '{"type": "structural_tag"}'
    }


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16"])
async def test_experts_are_asked_for_and_read_as_vllm_has_them(scripted, kind):
    """Of tokens from the second on; in two layers two each."""
    told = np.arange(12).reshape(3, 2, 2).astype(kind)
    with io.BytesIO() as file:
        np.save(file, told)
        encoded = base64.b64encode(file.getvalue()).decode()
    scripted.answer = changed(routed_experts=encoded)
    asking = replace(SAMPLING, experts_from=1)
    completion = await scripted.worker.generate("id", [1, 2], asking)
    assert scripted.asked[0][2]["sampling_params"]["routed_experts_prompt_start"] == 1
    assert completion.experts.tolist() == np.arange(12).reshape(3, 4).tolist()
    assert (await scripted.worker.generate("id", [1, 2], SAMPLING)).experts is None
    scripted.answer = GOOD
    assert (await scripted.worker.generate("id", [1, 2], asking)).experts is None


@pytest.mark.parametrize(
    "said",
    [
        "?", "", base64.b64encode(b"\x93NUMPY\x01\x00").decode(),
        base64.b64encode(packed(np.zeros((2, 2), np.int16))[:-1]).decode(),
        base64.b64encode(packed(np.zeros((2, 2), np.float32))).decode(),
        base64.b64encode(packed(np.zeros(2, np.int16))).decode(),
    ],
)  # fmt: skip
async def test_experts_that_are_none_are_no_answer(scripted, said):
    scripted.answer = changed(routed_experts=said)
    with pytest.raises(WorkerFailure, match="not of this protocol"):
        await scripted.worker.generate("id", [1, 2], replace(SAMPLING, experts_from=0))


async def test_the_control_routes(scripted, tmp_path):
    scripted.answer = {"results": [checksum(tmp_path)], "success": True}
    await scripted.worker.abort("id")
    await scripted.worker.pause("keep")
    await scripted.worker.load_weights(Weights(version=1, path=tmp_path))
    await scripted.worker.recompute()
    await scripted.worker.set_version(1)
    await scripted.worker.resume()
    await scripted.worker.check_health()
    load = {"method": "load_flash_weights", "kwargs": {"weights_path": str(tmp_path)}}
    assert scripted.asked == [
        ("POST", "/inference/v1/abort_requests", {"request_ids": ["generate-tokens-id"]}),
        ("POST", "/pause?mode=keep&clear_cache=false", None),
        ("POST", "/collective_rpc", load),
        ("POST", "/reset_prefix_cache?reset_running_requests=true&reset_external=true", None),
        ("POST", "/update_weight_version", {"new_version": "1"}),
        ("POST", "/resume", None),
        ("GET", "/health", None),
    ]


class Server:
    """Has the weights that it was given last, and says what it is told to after a delta."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.after_delta: object = None
        self.fails_in = ""  # a method
        self.gone = False

    async def handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else {"method": "sleep"}
        self.asked.append(body["method"])
        if self.gone:
            request.transport.close()
        if body["method"] == self.fails_in:
            return web.json_response({"results": [{"error": "OSError('no room')"}]})
        if body["method"] == "load_flash_delta":
            if isinstance(self.after_delta, int):
                return web.Response(status=self.after_delta)
            return web.json_response({"results": self.after_delta})
        if body["method"] == "load_flash_weights":
            path = Path(body["kwargs"]["weights_path"])
            return web.json_response({"results": [checksum(path)]})
        return web.json_response({"results": [None]})


@pytest.fixture
async def server():
    made = Server()
    app = web.Application()
    app.router.add_post("/collective_rpc", made.handle)
    app.router.add_post("/sleep", made.handle)
    async with TestServer(app) as running:
        made.worker = HttpWorker(str(running.make_url("/")))
        yield made
        await made.worker.close()


@pytest.fixture
def versions(tmp_path) -> list[Weights]:
    """Each is the one before, with a little changed."""
    made = []
    for version in range(5):
        folder = tmp_path / str(version)
        folder.mkdir()
        save_file({"a": np.full(4, version, np.float32)}, folder / "model.safetensors")
        delta = Delta(
            str(tmp_path / str(version - 1)), [TensorInfo("a", "float32", [4], 0, version)]
        )
        file_in(folder).parent.mkdir()
        told = {"delta": msgspec.json.encode(delta).decode()}
        save_file({}, file_in(folder), metadata=told)
        made.append(Weights(version=version, path=folder))
    return made


WHOLE, DELTA = "load_flash_weights", "load_flash_delta"


async def test_weights_after_those_that_it_has_come_as_what_changed(server, versions):
    await server.worker.load_weights(versions[0])
    for version in (1, 2):
        server.after_delta = [[[4, version]]]
        await server.worker.load_weights(versions[version])
    await server.worker.load_weights(versions[4])  # those before it have been passed over
    assert server.asked == [WHOLE, DELTA, DELTA, WHOLE]


async def test_one_that_was_started_anew_is_given_all_and_then_what_changes(server, versions):
    await server.worker.load_weights(versions[0])
    server.after_delta = [None]
    await server.worker.load_weights(versions[1])
    server.after_delta = [[[4, 2]]]
    await server.worker.load_weights(versions[2])
    assert server.asked == [WHOLE, DELTA, WHOLE, DELTA]


@pytest.mark.parametrize(
    "answer", [[[[4, 99]]], [[[3, 1]]], [[]], ["nonsense"], [[[4, 1]], {"error": "no"}], 500, 400]
)
async def test_one_that_has_not_what_it_should_after_a_delta_is_given_all_ever_after(
    server, versions, answer, caplog
):
    await server.worker.load_weights(versions[0])
    server.after_delta = answer
    await server.worker.load_weights(versions[1])
    assert "gets whole weights from now on" in caplog.text
    await server.worker.load_weights(versions[2])
    assert server.asked == [WHOLE, DELTA, WHOLE, WHOLE]


async def test_one_that_goes_away_while_it_is_given_a_delta_takes_others_later(server, versions):
    await server.worker.load_weights(versions[0])
    server.gone = True
    with pytest.raises(WorkerFailure):
        await server.worker.load_weights(versions[1])
    server.gone = False
    await server.worker.load_weights(versions[1])
    server.after_delta = [[[4, 2]]]
    await server.worker.load_weights(versions[2])
    assert server.asked[-2:] == [WHOLE, DELTA]


async def test_a_rank_that_says_what_it_failed_by_has_loaded_nothing(server, versions, tmp_path):
    server.fails_in = "load_shared_flash_weights"
    await server.worker.load_weights(replace(versions[0], shared=tmp_path))
    assert server.asked == ["load_shared_flash_weights", WHOLE]
    server.fails_in = WHOLE
    with pytest.raises(WorkerFailure, match="load_flash_weights: OSError.'no room'"):
        await server.worker.load_weights(versions[4])


async def test_one_that_has_slept_or_copied_from_a_gpu_is_given_all(server, versions, tmp_path):
    await server.worker.load_weights(versions[0])
    await server.worker.sleep("keep")
    await server.worker.load_weights(versions[1])
    shared = replace(versions[2], shared=tmp_path)
    await server.worker.load_weights(shared)
    await server.worker.load_weights(versions[3])
    assert server.asked == [WHOLE, "sleep", WHOLE, "load_shared_flash_weights", WHOLE]


async def test_sleep_forgets_the_weights_and_they_wake_before_the_keys_and_values(scripted):
    await scripted.worker.sleep("keep")
    await scripted.worker.wake_weights()
    await scripted.worker.wake_rest()
    assert scripted.asked == [
        ("POST", "/sleep?level=2&mode=keep", None),
        ("POST", "/wake_up?tags=weights", None),
        ("POST", "/wake_up?tags=kv_cache", None),
    ]


async def test_weights_in_the_trainers_memory_are_read_there_and_else_as_files(scripted, tmp_path):
    shared = tmp_path / "shared"
    weights = Weights(version=1, path=tmp_path, shared=shared)
    in_memory = {"method": "load_shared_flash_weights", "kwargs": {"directory": str(shared)}}
    files = {"method": "load_flash_weights", "kwargs": {"weights_path": str(tmp_path)}}
    scripted.answer = {"results": [None]}
    await scripted.worker.load_weights(weights)
    asked = [body for _, route, body in scripted.asked if route == "/collective_rpc"]
    assert asked == [in_memory]
    scripted.asked.clear()
    scripted.status = 500
    with pytest.raises(WorkerFailure, match="see the files in"):
        await scripted.worker.load_weights(weights)
    assert [body for _, _, body in scripted.asked] == [in_memory, files]


async def test_requests_share_no_keys_and_values_with_those_that_kept_older_ones(scripted):
    async def salt() -> str | None:
        scripted.asked.clear()
        await scripted.worker.generate("id", [1, 2], SAMPLING)
        return scripted.asked[0][2].get("cache_salt")

    async def publish(mode, version: int) -> None:
        await scripted.worker.pause(mode)
        await scripted.worker.set_version(version)

    await publish("keep", 1)
    assert await salt() is None
    scripted.asked.clear()
    await publish("keep_stale_kv", 2)
    assert scripted.asked[0] == ("POST", "/pause?mode=keep&clear_cache=false", None)
    assert await salt() == "2"
    await publish("keep_stale_kv", 3)
    assert await salt() == "3"


async def test_a_server_that_keeps_old_keys_and_values_has_failed(scripted):
    scripted.answer = {"success": False}
    with pytest.raises(WorkerFailure, match="can't drop the keys and values of old weights"):
        await scripted.worker.recompute()


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
        await scripted.worker.load_weights(Weights(version=1, path=tmp_path))


LONG = SamplingParams(max_tokens=128)


def event(tokens: list[int], **more) -> bytes:
    """A chunk of a stream, without versions unless it is the last."""
    fields = {"token_ids": tokens, "finish_reason": None, "weight_versions": None, **more}
    fields["logprobs"] = {"content": [{"logprob": -float(token)} for token in tokens]}
    return b"data: " + json.dumps({"choices": [fields]}).encode() + b"\n\n"


LAST = {"finish_reason": "stop", "weight_versions": [{"version": "4", "start": 0, "end": 3}]}
STREAM = event([7]) + b": a comment\n\n" + event([8, 9], **LAST) + event([5])
STREAM += b"data: [DONE]\n\n"


@contextlib.asynccontextmanager
async def streaming(*answers: bytes):
    """A worker that answers so and hangs up, and what it told before its answer was whole."""
    async with raw_server(*answers, hang_up=True) as server:
        worker, told = HttpWorker(server.url), []

        async def generate() -> Completion:
            return await worker.generate("id", [1], LONG, lambda *new: told.append(new))

        try:
            yield generate, told, server
        finally:
            await worker.close()


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize("cut", [1, 7, 10_000])
async def test_a_streamed_answer_wherever_it_is_cut(cut, ends):
    stream = STREAM.replace(b"\n", ends.encode())
    pieces = [stream[at : at + cut] for at in range(0, len(stream), cut)]
    async with streaming(chunked(*pieces, fields=EVENTS)) as (generate, told, server):
        completion = await generate()
    assert told == [([7], [-7.0]), ([8, 9], [-8.0, -9.0])]
    assert completion == Completion(
        token_ids=[7, 8, 9],
        logprobs=[-7.0, -8.0, -9.0],
        versions=[4, 4, 4],
        temperature=1.0,
        finish_reason="stop",
        worker=server.url,
    )
    asked = json.loads(server.requests[0][2])
    assert (asked["stream"], asked["sampling_params"]["stream_interval"]) == (True, 32)


@pytest.mark.parametrize(("code", "fault"), [(400, BadRequest), (500, WorkerFailure)])
async def test_a_stream_may_hold_a_refusal_in_the_place_of_an_event(code, fault):
    told = json.dumps({"error": {"message": "no such grammar", "code": code}}).encode()
    answers = chunked(b"data: " + told + b"\n\ndata: [DONE]\n\n", fields=EVENTS)
    async with streaming(answers) as (generate, _, _):
        with pytest.raises(fault, match="no such grammar"):
            await generate()


async def test_short_answers_and_those_that_nobody_listens_to_come_whole():
    async with raw_server(*[answer(json.dumps(GOOD).encode())] * 2) as server:
        worker, told = HttpWorker(server.url), []
        short = SamplingParams(max_tokens=127)
        await worker.generate("id", [1], short, lambda *new: told.append(new))
        await worker.generate("id", [1], LONG)
        await worker.close()
    assert not told
    assert [b"stream" in body for _, _, body in server.requests] == [False, False]


async def test_a_worker_that_does_not_stream_answers_whole():
    async with streaming(answer(json.dumps(GOOD).encode())) as (generate, told, _):
        assert (await generate()).token_ids == [7, 8, 9]
        assert not told


@pytest.mark.parametrize(
    ("said", "told_of"),
    [
        (chunked(event([7]), whole=False, fields=EVENTS), "can't be reached: .*disconnected"),
        (chunked(event([7]), b"data: [DONE]\n\n", fields=EVENTS), "ended its answer before"),
        (chunked(event([7]), b'data: {"error": 1}\n\n', fields=EVENTS), "not of this protocol"),
        (chunked(event([7]), b"data: nonsense\n\n", fields=EVENTS), "not of this protocol"),
        (chunked(event([7]), b"x" * ((1 << 26) + 1), fields=EVENTS), "a stream that is too long"),
        (
            chunked(event([7]), event([8], finish_reason="stop", weight_versions=[
                {"version": "4", "start": 0, "end": 3}]), fields=EVENTS),
            "not of this protocol .*span 0 … 3 of 2 tokens",
        ),
    ],
)  # fmt: skip
async def test_what_was_told_is_known_of_a_stream_that_breaks_off(said, told_of):
    async with streaming(said) as (generate, told, _):
        with pytest.raises(WorkerFailure, match=told_of):
            await generate()
        assert told[0] == ([7], [-7.0])


async def test_a_stream_that_breaks_off_after_its_last_token_is_whole():
    said = chunked(event([7]), event([8, 9], **LAST), whole=False, fields=EVENTS)
    async with streaming(said) as (generate, _, _):
        assert (await generate()).token_ids == [7, 8, 9]


async def test_a_logprob_that_stands_for_nan_is_no_answer():
    nan = [{"logprob": -1.0}, {"logprob": -9999.0}, {"logprob": -3.0}]
    said = answer(json.dumps(changed(logprobs={"content": nan})).encode())
    async with streaming(said) as (generate, _, _):
        with pytest.raises(WorkerFailure, match="a logprob is nan"):
            await generate()


async def test_a_redirect_is_not_followed(scripted):
    scripted.status, scripted.answer = 307, "elsewhere"
    with pytest.raises(WorkerFailure, match="answered 307: elsewhere"):
        await scripted.worker.generate("id", [1], SAMPLING)
    assert len(scripted.asked) == 1
