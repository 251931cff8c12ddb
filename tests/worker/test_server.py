"""The worker's routes, spoken to over HTTP."""

import asyncio

import pytest
from aiohttp.test_utils import TestClient, TestServer

from flash.system.listener import Listener
from flash.warm_start.small_policy import create
from flash.worker.engine import EmbeddedEngine
from flash.worker.server import make_app

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = [f"w{n}" for n in range(50)]
    return create(folder, words, layers=1, hidden_size=32, heads=2, max_tokens=4096)


@pytest.fixture
async def client(model):
    engine = EmbeddedEngine(
        str(model), device="cpu", dtype="float32", cache_tokens=4096, max_running=8
    )
    # As `serve` runs it: a client that goes away takes its request with it.
    app = make_app(engine, api_key="secret", listener=Listener("127.0.0.1", 0))
    server = TestServer(app, handler_cancellation=True)
    headers = {"Authorization": "Bearer secret"}
    async with TestClient(server, headers=headers) as client:
        client.engine = engine
        yield client
    engine.close()


def body(**changes):
    sampling = {"max_tokens": 4, "temperature": 1.0, "logprobs": 0, **changes.pop("sampling", {})}
    return {"request_id": "r", "token_ids": [5, 6, 7], "sampling_params": sampling, **changes}


async def generate(client, **changes):
    response = await client.post("/inference/v1/generate", json=body(**changes))
    return response.status, await response.json()


async def test_generate_answers_tokens_logprobs_and_version_spans(client):
    status, answer = await generate(client)
    (choice,) = answer["choices"]
    assert status == 200
    assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == 4
    assert all(entry["logprob"] < 0 for entry in choice["logprobs"]["content"])
    assert choice["weight_versions"] == [{"version": "0", "start": 0, "end": 4}]
    assert choice["finish_reason"] == "length"


async def test_weights_are_replaced_while_paused_and_the_version_is_told(client, model):
    assert (await client.post("/pause?mode=keep")).status == 200
    load = {"method": "load_flash_weights", "kwargs": {"weights_path": str(model)}}
    assert (await client.post("/collective_rpc", json=load)).status == 200
    assert (await client.post("/update_weight_version", json={"new_version": "3"})).status == 200
    assert (await client.post("/resume")).status == 200
    assert await (await client.get("/weight_info")).json() == {"weight_version": "3"}
    _, answer = await generate(client)
    assert answer["choices"][0]["weight_versions"] == [{"version": "3", "start": 0, "end": 4}]


async def test_abort_requests_answers_the_request_with_what_it_has(client):
    call = asyncio.ensure_future(generate(client, sampling={"max_tokens": 3000}))
    while not client.engine.running:
        await asyncio.sleep(0)
    ids = {"request_ids": ["generate-tokens-r", "generate-tokens-unknown"]}
    assert (await client.post("/inference/v1/abort_requests", json=ids)).status == 200
    _, answer = await call
    assert answer["choices"][0]["finish_reason"] == "abort"


async def test_a_client_that_goes_away_frees_its_requests_place(client):
    call = asyncio.ensure_future(generate(client, sampling={"max_tokens": 4000}))
    while not client.engine.running:
        await asyncio.sleep(0)
    call.cancel()
    async with asyncio.timeout(5):
        while client.engine.running:
            await asyncio.sleep(0)


async def test_requests_under_way_are_frozen_while_paused_and_go_on_after(client):
    call = asyncio.ensure_future(generate(client, sampling={"max_tokens": 200}))
    while not client.engine._sampled_so_far("generate-tokens-r")[0]:
        await asyncio.sleep(0)
    await client.post("/pause?mode=keep")
    before = client.engine._sampled_so_far("generate-tokens-r")[0]
    assert (await client.get("/health")).status == 200
    assert client.engine._sampled_so_far("generate-tokens-r")[0] == before
    await client.post("/update_weight_version", json={"new_version": "1"})
    await client.post("/resume")
    _, answer = await call
    spans = answer["choices"][0]["weight_versions"]
    assert spans == [
        {"version": "0", "start": 0, "end": len(before)},
        {"version": "1", "start": len(before), "end": 200},
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_ids": "5 6"}, "token_ids must be a list of integers"),
        ({"token_ids": [5, 6.0]}, "token_ids must be a list of integers"),
        ({"token_ids": []}, "token_ids is empty"),
        ({"sampling": {"max_tokens": "4"}}, "max_tokens must be of type int"),
        ({"sampling": {"temperature": None}}, "temperature must be a number"),
        ({"sampling": {"temperature": "hot"}}, "temperature must be a number"),
        ({"sampling": {"temperature": float("nan")}}, "temperature=nan must be"),
        ({"sampling": {"stop_token_ids": 2}}, "stop_token_ids must be a list of integers"),
        ({"sampling": {"max_tokens": 99_999}}, "more than the cache's 4096"),
        ({"sampling": {"top_p": 0.9}}, "['top_p'], which this worker can't do"),
        ({"sampling_params": None}, "sampling_params must be of type dict"),
    ],
)
async def test_a_bad_request_is_told_which_field(client, changes, message):
    status, answer = await generate(client, **changes)
    assert status == 400
    assert message in answer["error"]["message"]


async def test_what_is_not_json_or_not_known_is_refused(client, tmp_path):
    for garbage in (b"{", b"\xff\xfe"):
        response = await client.post("/inference/v1/generate", data=garbage)
        assert response.status == 400
        assert "not JSON" in (await response.json())["error"]["message"]
    assert (await client.post("/inference/v1/generate", json=[1])).status == 400
    assert (await client.post("/pause?mode=stop")).status == 400
    assert (await client.post("/collective_rpc", json={"method": "exec"})).status == 400
    load = {"method": "load_flash_weights", "kwargs": {"weights_path": str(tmp_path)}}
    assert (await client.post("/collective_rpc", json=load)).status == 400, "no weights"
    assert (await client.post("/update_weight_version", json={})).status == 400


async def test_all_but_health_asks_for_the_key(client):
    wrong = {"Authorization": "Bearer guess"}
    for route in ("/weight_info", "/metrics"):
        assert (await client.get(route, headers=wrong)).status in (401, 404)
    response = await client.post("/inference/v1/generate", json=body(), headers=wrong)
    assert response.status == 401
    assert (await client.get("/health", headers=wrong)).status == 200


async def test_no_web_page_is_obeyed_whatever_it_sends(client):
    for headers in ({"Origin": "https://evil.example"}, {"Host": "evil.example"}):
        response = await client.post("/pause?mode=keep", headers=headers)
        assert response.status == 403
    status, _ = await generate(client)
    assert status == 200, "it was not paused"


async def test_weights_that_can_not_be_read_now_are_not_called_wrong(client, tmp_path):
    (tmp_path / "model.safetensors").mkdir()  # what can be read elsewhere, but not here
    load = {"method": "load_flash_weights", "kwargs": {"weights_path": str(tmp_path)}}
    assert (await client.post("/collective_rpc", json=load)).status == 503


async def test_an_engine_that_has_ended_is_unhealthy_and_says_so(client):
    client.engine.close()
    assert (await client.get("/health")).status == 503
    status, answer = await generate(client)
    assert status == 500
    assert "the engine has ended" in answer["error"]["message"]
