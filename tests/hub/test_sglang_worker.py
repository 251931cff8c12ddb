"""The client of SGLang's routes, against a server that does and insists on what SGLang does."""

import asyncio
import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from flash.errors import InferenceFailure, PublishFailure
from flash.fakes import FakeSglang, FakeWorker
from flash.hub.hub import InferenceHub
from flash.hub.sglang_worker import SglangWorker
from flash.hub.worker import BadRequest, WorkerBroken, WorkerFailure
from flash.types import Completion, GenerateRequest, SamplingParams, Weights
from tests.hub.raw_server import answer, chunked, raw_server

EOS = 5
EVENTS = ("Content-Type: text/event-stream",)
SHORT = SamplingParams(max_tokens=3, temperature=0.5, stop_token_ids=(9,))
LONG = SamplingParams(max_tokens=200)


def quick(**options) -> FakeWorker:
    return FakeWorker("worker", **({"token_s": (0, 0), "load_s": (0, 0)} | options))


@contextlib.asynccontextmanager
async def serving(worker: FakeWorker, **options):
    """The fake server, and its client."""
    server = FakeSglang(worker, api_key="key", **options)
    async with TestServer(server.app()) as listener:
        client = SglangWorker(str(listener.make_url("/")), api_key="key")
        try:
            yield server, client
        finally:
            await client.close()


@pytest.fixture
def weights(tmp_path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    return tmp_path


def routes(server: FakeSglang) -> list[str]:
    return [route for route, _ in server.asked]


# ── requests ─────────────────────────────────────────────────────────────────────────────────


async def test_a_request_says_all_of_how_it_is_sampled():
    async with serving(quick(version=4, script=lambda *_: [7, 8, 9])) as (server, client):
        await client.set_version(4)
        server.asked.clear()
        completion = await client.generate("id", [1, 2], SHORT)
    assert server.asked == [
        (
            "/generate",
            {
                "rid": "id.",
                "input_ids": [1, 2],
                "sampling_params": {
                    "max_new_tokens": 3, "temperature": 0.5, "stop_token_ids": [9],
                    "ignore_eos": False, "top_p": 1.0, "top_k": -1, "min_p": 0.0,
                    "frequency_penalty": 0.0, "presence_penalty": 0.0, "repetition_penalty": 1.0,
                    "min_new_tokens": 0,
                },
                "return_logprob": True,
            },
        )
    ]  # fmt: skip
    assert completion.token_ids == [7, 8, 9]
    assert len(completion.logprobs) == 3
    assert completion.versions == [4, 4, 4]
    assert (completion.temperature, completion.finish_reason) == (0.5, "length")


async def test_only_what_a_request_names_stops_it_though_sglang_stops_at_the_models_own_end():
    """With stop tokens it can't be told to ignore that; the hub then asks for the rest."""
    said = [7, EOS, 8, 9]

    def go_on(prompt, sampling):
        """As a sampler does: from where the prompt ends, up to the first token that stops it."""
        rest = said[len(prompt) - 1 :]
        ends = [at for at, token in enumerate(rest) if token in sampling.stop_token_ids]
        return rest[: ends[0] + 1] if ends else rest

    sampling = SamplingParams(max_tokens=50, stop_token_ids=(9,))
    async with serving(quick(script=go_on), eos_token_ids=(EOS,)) as (server, client):
        await client.set_version(0)
        without = await client.generate("id", [1], SamplingParams(max_tokens=4))
        assert without.token_ids == said, "without stop tokens it ignores its own end"
        server.asked.clear()
        async with InferenceHub([client]) as hub:
            answered = await hub.generate(GenerateRequest(token_ids=[1], sampling=sampling))
            assert (answered.token_ids, answered.finish_reason) == (said, "stop")
            prompts = [body["input_ids"] for route, body in server.asked if route == "/generate"]
            assert prompts == [[1], [1, 7, EOS]]


async def test_experts_are_asked_for_and_come_with_the_last_event():
    worker = quick(token_s=(0.0005, 0.0005), tokens=(200, 200), tell_s=0.02, experts=4)
    async with serving(worker) as (server, client):
        await client.set_version(2)
        for sampling in (
            replace(LONG, experts_from=1),
            SamplingParams(max_tokens=3, experts_from=1),
        ):
            completion = await client.generate("id", [1, 2, 3], sampling, lambda *_: None)
            asked = server.asked[-1][1]
            assert (asked["return_routed_experts"], asked["routed_experts_start_len"]) == (True, 1)
            tokens = 3 + len(completion.token_ids)
            assert completion.experts.tolist() == [[place] * 4 for place in range(1, tokens - 1)]
        await client.generate("id", [1, 2, 3], SamplingParams(max_tokens=3))
        assert "return_routed_experts" not in server.asked[-1][1]


@pytest.mark.parametrize("incremental", [True, False])
async def test_long_answers_come_in_events_of_either_kind(incremental):
    worker = quick(token_s=(0.0005, 0.0005), tokens=(200, 200), tell_s=0.02)
    told = []
    async with serving(worker, incremental=incremental) as (server, client):
        await client.set_version(2)
        completion = await client.generate("id", [1], LONG, lambda *new: told.append(new))
    assert server.asked[-1][1]["stream"] is True
    assert server.asked[-1][1]["sampling_params"]["stream_interval"] == 32
    assert len(told) > 1
    assert [token for tokens, _ in told for token in tokens] == completion.token_ids
    assert [logprob for _, logprobs in told for logprob in logprobs] == completion.logprobs
    assert len(completion.token_ids) == 200
    assert completion.versions == [2] * 200


async def test_an_aborted_request_answers_what_it_has_and_no_other_is_aborted_with_it():
    """SGLang aborts all whose ids begin like the one that it gets."""
    worker = quick(token_s=(0.005, 0.005), tokens=(10**6, 10**6))
    sampling = SamplingParams(max_tokens=40)
    async with serving(worker) as (_, client):
        await client.set_version(0)
        calls = [
            asyncio.ensure_future(client.generate(name, [1], sampling)) for name in ("1", "10")
        ]
        while worker.running < 2:
            await asyncio.sleep(0)
        await client.abort("1")
        first, second = await asyncio.gather(*calls)
    assert (first.finish_reason, second.finish_reason) == ("abort", "length")
    assert len(first.token_ids) < len(second.token_ids) == 40


async def test_the_key_is_asked_for():
    async with serving(quick()) as (server, _), TestServer(server.app()) as listener:
        stranger = SglangWorker(str(listener.make_url("/")))
        with pytest.raises(WorkerFailure, match="401"):
            await stranger.check_health()
        await stranger.close()


# ── what it answers ──────────────────────────────────────────────────────────────────────────


def meta(**changes) -> dict:
    fields = {
        "finish_reason": {"type": "length", "length": 2},
        "completion_tokens": 2,
        "output_token_logprobs": [[-1.0, 7, None], [-2.0, 8, None]],
        "weight_versions": [{"version": "4", "start": 0, "end": 1},
                            {"version": "5", "start": 1, "end": 2}],
    }  # fmt: skip
    return {key: value for key, value in {**fields, **changes}.items() if value is not ...}


def said(ids=(7, 8), **changes) -> bytes:
    return json.dumps({"text": "", "output_ids": list(ids), "meta_info": meta(**changes)}).encode()


def refused(code: int) -> dict:
    return {"type": "abort", "message": "no", "status_code": code, "err_type": None}


@contextlib.asynccontextmanager
async def answering(*answers: bytes):
    async with raw_server(*answers, hang_up=True) as server:
        client = SglangWorker(server.url)
        try:
            yield client, server
        finally:
            await client.close()


async def test_versions_are_those_of_each_token():
    async with answering(answer(said())) as (client, server):
        assert await client.generate("id", [1], SHORT) == Completion(
            token_ids=[7, 8],
            logprobs=[-1.0, -2.0],
            versions=[4, 5],
            temperature=0.5,
            finish_reason="length",
            worker=server.url,
        )


@pytest.mark.parametrize(
    ("body", "error", "match"),
    [
        (said(output_token_logprobs=[[-1.0, 7, None], [-2.0, 3, None]]), WorkerBroken,
         "logprobs of other tokens than it has sampled"),
        (said(output_token_logprobs=[[-1.0, 7, None]]), WorkerFailure,
         "2 tokens and 1 logprobs, where 2 are new"),
        (said(output_token_logprobs=...), WorkerFailure, "2 tokens and 0 logprobs"),
        (said(output_token_logprobs=[[None, 7, None], [-2.0, 8, None]]), WorkerFailure,
         "a logprob is not finite"),
        (said(ids=[7]), WorkerFailure, "1 tokens and 2 logprobs, where 2 are new"),
        (said(completion_tokens=-1), WorkerFailure, "where -1 are new"),
        (said(weight_versions=...), WorkerFailure, "does not tell which version.*update it"),
        (said(weight_versions=[{"version": "4", "start": 0, "end": 3}]), WorkerFailure,
         "span 0 … 3 of 2 tokens"),
        (said(weight_versions=[{"version": "default", "start": 0, "end": 2}]), WorkerFailure,
         "not of this protocol"),
        (said(finish_reason=None), WorkerFailure, "without finish_reason"),
        (said(finish_reason={"type": "stop", "matched": "NaN happened"}), WorkerBroken,
         "which it says to match 'NaN happened'"),
        (said(finish_reason=refused(400)), BadRequest, "no"),
        (said(finish_reason=refused(503)), WorkerFailure, "no"),
        (b'{"output_ids": [7]}', WorkerFailure, "without meta_info"),
        (b"[1]", WorkerFailure, "not of this protocol"),
    ],
)  # fmt: skip
async def test_what_can_not_be_true_is_no_answer(body, error, match):
    async with answering(answer(body)) as (client, _):
        with pytest.raises(error, match=match):
            await client.generate("id", [1], SHORT)


async def test_tokens_that_no_span_covers_have_no_version():
    """The hub then refuses the answer: -1 was never published."""
    spans = [{"version": "4", "start": 0, "end": 1}]
    async with answering(answer(said(weight_versions=spans))) as (client, _):
        assert (await client.generate("id", [1], SHORT)).versions == [4, -1]


def event(body: bytes) -> bytes:
    return b"data: " + body + b"\n\n"


BEGUN = event(
    said(ids=[7], completion_tokens=1, output_token_logprobs=[[-1.0, 7, None]],
         finish_reason=None, weight_versions=...)
)  # fmt: skip


@pytest.mark.parametrize(
    ("last", "token_ids"),
    [
        (said(), [7, 8]),  # all of it again
        (said(ids=[8], output_token_logprobs=[[-2.0, 8, None]]), [7, 8]),  # what is new
        # An abort in the queue tells the last token once more.
        (
            said(ids=[7], completion_tokens=1, output_token_logprobs=[[-1.0, 7, None]],
                 finish_reason={"type": "abort", "message": "Abort in waiting queue"},
                 weight_versions=[{"version": "4", "start": 0, "end": 1}]),
            [7],
        ),
    ],
)  # fmt: skip
async def test_no_token_of_a_stream_counts_twice(last, token_ids):
    async with answering(chunked(BEGUN, event(last), fields=EVENTS)) as (client, _):
        completion = await client.generate("id", [1], LONG, lambda *_: None)
    assert completion.token_ids == token_ids
    assert len(completion.logprobs) == len(completion.versions) == len(token_ids)


@pytest.mark.parametrize(
    ("rest", "whole", "error", "match"),
    [
        ((), False, WorkerFailure, "can't be reached"),
        ((b"data: [DONE]\n\n",), True, WorkerFailure, "ended its answer before"),
        ((b'data: {"error": {"message": "too long", "code": 400}}\n\n',), True, BadRequest,
         "too long"),
        ((b'data: {"error": {"message": "died", "code": 500}}\n\n',), True, WorkerFailure, "died"),
        ((event(said(ids=[1, 2, 3, 8])),), True, WorkerBroken, "logprobs of other tokens"),
    ],
)  # fmt: skip
async def test_what_was_told_is_known_of_a_stream_that_breaks_off(rest, whole, error, match):
    told = []
    stream = chunked(BEGUN, *rest, whole=whole, fields=EVENTS)
    if error is WorkerBroken:  # its logprobs are of 7 and 8
        stream = chunked(BEGUN, event(said(ids=[3, 9])), fields=EVENTS)
    async with answering(stream) as (client, _):
        with pytest.raises(error, match=match):
            await client.generate("id", [1], LONG, lambda *new: told.append(new))
    assert told == [([7], [-1.0])]


@pytest.mark.parametrize(
    ("status", "error"), [(400, BadRequest), (401, WorkerFailure), (500, WorkerFailure)]
)
async def test_a_mistake_of_the_request_is_told_from_a_failing_server(status, error):
    async with answering(answer(b'{"error": {"message": "x"}}', status=f"{status} no")) as (c, _):
        with pytest.raises(error):
            await c.generate("id", [1], SHORT)


# ── weights ──────────────────────────────────────────────────────────────────────────────────


def update(weights: Path, *, flushes: bool = True) -> tuple[str, dict]:
    body = {"model_path": str(weights), "load_format": "auto", "flush_cache": flushes,
            "weight_version": "1"}  # fmt: skip
    return "/update_weights_from_disk", body


VERSION = ("/update_weight_version", {"new_version": "1", "abort_all_requests": False})
CONTINUE = ("/continue_generation", {})


def pause(mode: str) -> tuple[str, dict]:
    return "/pause_generation", {"mode": mode}


@pytest.mark.parametrize(
    ("mode", "pauses"),
    [
        ("keep", [pause("retract")]),
        ("wait", [pause("retract")]),
        ("abort", [CONTINUE, pause("abort"), pause("retract")]),
        ("keep_stale_kv", [("/server_info", None), pause("in_place")]),
    ],
)
async def test_the_routes_of_a_publish(mode, pauses, weights):
    async with (
        serving(quick(), overlap=False) as (server, client),
        InferenceHub([client], update_mode=mode) as hub,
    ):
        server.asked.clear()
        await hub.publish(Weights(version=1, path=weights))
        asked = server.asked.copy()
    assert asked == [*pauses, update(weights, flushes=mode != "keep_stale_kv"), VERSION, CONTINUE]
    assert server.worker.recomputed == (mode != "keep_stale_kv")


@pytest.mark.parametrize("mode", ["keep", "keep_stale_kv", "abort", "wait"])
@pytest.mark.parametrize("max_tokens", [100, 400])  # whole, in events
async def test_each_token_has_the_version_that_sampled_it_in_every_mode(mode, max_tokens, weights):
    worker = quick(token_s=(0.0005, 0.0005), tokens=(10**6, 10**6), tell_s=0.01)
    async with (
        serving(worker, overlap=False) as (_, client),
        InferenceHub([client], update_mode=mode, max_running=4) as hub,
    ):
        request = GenerateRequest(token_ids=[1], sampling=SamplingParams(max_tokens=max_tokens))
        calls = [asyncio.ensure_future(hub.generate(request)) for _ in range(3)]
        while worker.running < 3:
            await asyncio.sleep(0)
        report = await hub.publish(Weights(version=1, path=weights))
        answers = await asyncio.gather(*calls)
        later = await hub.generate(request)
    assert report.workers == 1
    for completion in answers:
        assert len(completion.token_ids) == len(completion.logprobs) == max_tokens
        assert completion.versions == sorted(completion.versions)
        assert set(completion.versions) <= ({0} if mode == "wait" else {0, 1})
        assert completion.versions[-1] == (mode != "wait")
    assert later.versions == [1] * max_tokens


async def test_requests_share_no_keys_and_values_with_those_that_kept_older_ones(weights):
    async with serving(quick(), overlap=False) as (server, client):

        async def salt() -> str | None:
            await client.generate("id", [1, 2], SHORT)
            return server.asked[-1][1].get("cache_salt")

        for version, mode, wanted in ((1, "keep", None), (2, "keep_stale_kv", "2")):
            await client.pause(mode)
            await client.set_version(version)
            await client.resume()
            assert await salt() == wanted


async def test_servers_whose_steps_overlap_can_not_keep_old_keys_and_values(weights):
    async with (
        serving(quick(), overlap=True) as (_, client),
        InferenceHub([client], update_mode="keep_stale_kv") as hub,
    ):
        with pytest.raises(PublishFailure, match="start it with --disable-overlap-schedule"):
            await hub.publish(Weights(version=1, path=weights))


async def test_a_load_that_is_refused_excludes_the_server_and_says_what_it_must_have(weights):
    async with serving(quick()) as (server, client):
        server.load_error = "shape mismatch"
        with pytest.raises(
            WorkerFailure, match="shape mismatch.*must serve the model that is trained, and see"
        ):
            await client.load_weights(Weights(version=1, path=weights))
        async with InferenceHub([client], recovery_timeout_s=0.05) as hub:
            report = await hub.publish(Weights(version=1, path=weights))
            assert report.workers == 0
            with pytest.raises(InferenceFailure, match="shape mismatch"):
                await hub.generate(GenerateRequest(token_ids=[1], sampling=SHORT))


async def test_a_server_that_a_broken_publish_has_left_frozen_comes_back(weights):
    """Frozen in place its requests can't be aborted before they go on."""
    worker = quick(token_s=(0.005, 0.005), tokens=(10**6, 10**6))
    async with serving(worker, overlap=False) as (server, client):
        await client.set_version(0)
        sampling = SamplingParams(max_tokens=10**5)
        call = asyncio.ensure_future(client.generate("id", [1], sampling))
        while not worker.running:
            await asyncio.sleep(0)
        await client.pause("keep_stale_kv")
        await client.check_health()
        async with InferenceHub(
            [client], version=3, weights=Weights(version=3, path=weights)
        ) as hub:
            assert (await call).finish_reason == "abort"
            answered = await hub.generate(GenerateRequest(token_ids=[1], sampling=SHORT))
            assert answered.versions == [3] * 3
    assert server.worker.loaded == [weights]


async def test_requests_of_a_server_that_sleeps_go_on_once_it_is_awake(weights):
    worker = quick(token_s=(0.001, 0.001), tokens=(10**6, 10**6))
    async with serving(worker) as (server, client):

        async def make_room() -> None:
            """There is room."""

        async with InferenceHub(
            [client], weights=Weights(version=0, path=weights), make_room=make_room
        ) as hub:
            sampling = SamplingParams(max_tokens=100)
            call = asyncio.ensure_future(
                hub.generate(GenerateRequest(token_ids=[1], sampling=sampling))
            )
            while not worker.running:
                await asyncio.sleep(0)
            server.asked.clear()
            async with hub.asleep():
                assert routes(server)[-2:] == ["/pause_generation", "/release_memory_occupation"]
                server.asked.clear()
                assert not worker.has_memory
            assert (await call).versions == [0] * 100
    assert server.asked == [
        ("/resume_memory_occupation", {"tags": ["weights"]}),
        ("/update_weights_from_disk", {**update(weights)[1], "weight_version": "0"}),
        ("/update_weight_version", {**VERSION[1], "new_version": "0"}),
        ("/resume_memory_occupation", {"tags": ["kv_cache"]}),
        CONTINUE,
    ]


# ── faults, behind the hub ───────────────────────────────────────────────────────────────────


def other_logprobs(answered: dict) -> None:
    for entry in answered["meta_info"]["output_token_logprobs"]:
        entry[1] += 1


def no_versions(answered: dict) -> None:
    del answered["meta_info"]["weight_versions"]


def unknown_version(answered: dict) -> None:
    answered["meta_info"]["weight_versions"][0]["version"] = "77"


@pytest.mark.parametrize("change", [other_logprobs, no_versions, unknown_version])
async def test_an_answer_that_can_not_be_true_is_asked_for_elsewhere(change):
    async with (
        serving(quick()) as (bad, lies),
        serving(quick()) as (_, honest),
        InferenceHub([lies, honest]) as hub,
    ):
        bad.changes += [change] * 8
        request = GenerateRequest(token_ids=[1], sampling=SHORT)
        answers = await asyncio.gather(*[hub.generate(request) for _ in range(8)])
        assert {answered.versions[0] for answered in answers} == {0}
        assert lies.name not in {answered.worker for answered in answers}


async def test_a_server_that_dies_in_a_stream_costs_nothing_that_it_has_told():
    worker = quick(token_s=(0.0005, 0.0005), tokens=(10**6, 10**6), tell_s=0.01)
    async with serving(worker) as (server, client), InferenceHub([client]) as hub:
        server.cut_after = 2
        completion = await hub.generate(GenerateRequest(token_ids=[1], sampling=LONG))
    assert len(completion.token_ids) == len(completion.logprobs) == 200
    prompts = [len(body["input_ids"]) for route, body in server.asked if route == "/generate"]
    assert prompts[0] == 1 < prompts[-1]


async def test_an_empty_answer_of_a_server_means_no_more_than_it_says():
    async def nothing(request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application()
    app.router.add_post("/generate", nothing)
    async with TestServer(app) as listener:
        client = SglangWorker(str(listener.make_url("/")))
        with pytest.raises(WorkerFailure, match="not of this protocol"):
            await client.generate("id", [1], SHORT)
        await client.close()
