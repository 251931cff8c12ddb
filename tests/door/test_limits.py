"""What the door does not let through, and what it cancels."""

import asyncio
import contextlib
import io
import json
import logging

import aiohttp
import openai
import pytest

from flash.door import Door
from flash.errors import InferenceFailure
from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub

USER = {"role": "user", "content": "hi"}
CHAT = {"model": "policy", "messages": [USER]}


def chat(client, **options):
    return client.chat.completions.create(**{**CHAT, **options})


async def post(house, token, *, path="/v1/chat/completions", **options):
    """A request by hand: status, headers and the JSON of the answer."""
    headers = {"Authorization": f"Bearer {token}"} if token is not None else {}
    async with (
        aiohttp.ClientSession(headers=headers) as http,
        http.post(house.door.url + path, **options) as response,
    ):
        return response.status, response.headers, json.loads(await response.text())


async def until(condition):
    """Waits, turn by turn, for a state that no event tells."""
    while not condition():
        await asyncio.sleep(0)


# ── who ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("token", [None, "", "guess", "ünknown"])
async def test_without_a_known_token_nothing_is_answered(enter, token):
    async with enter() as house:
        for path in ("/v1/chat/completions", "/v1/completions", "/episodes/x/v1/completions"):
            status, _, answer = await post(house, token, path=path, json=CHAT)
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        for path in ("/metrics", "/v1/models"):
            async with aiohttp.ClientSession() as http, http.get(house.door.url + path) as response:
                assert response.status == 401


@pytest.mark.parametrize(
    "path",
    ["/", "/v1", "/v1/embeddings", "/pause", "/resume", "/collective_rpc", "/sleep", "/health",
     "/inference/v1/generate", "/inference/v1/abort_requests", "/update_weight_version",
     "/v1/../collective_rpc", "/episodes/{token}/pause", "/episodes/{token}/metrics"],
)  # fmt: skip
async def test_no_other_route_exists_whoever_asks(enter, path):
    async with enter() as house:
        path = path.format(token=house.door.token)
        status, _, answer = await post(house, house.door.token, path=path, json={})
        assert status in (404, 405)
        assert answer["error"]["type"] == "invalid_request_error"
        assert house.worker.started == house.worker.loaded == []


@pytest.mark.parametrize("name", ["Origin", "Host"])
async def test_a_web_page_gets_no_answer_even_with_a_token(enter, name):
    async with enter() as house:
        headers = {name: "http://evil.example" if name == "Origin" else "evil.example"}
        for path in ("/v1/chat/completions", f"/episodes/{house.door.token}/v1/completions"):
            status, _, answer = await post(
                house, house.door.token, path=path, json=CHAT, headers=headers
            )
            assert status == 403
            assert "evil.example" in answer["error"]["message"]


async def test_tokens_are_long_and_no_two_are_the_same(enter):
    async with enter() as house, enter() as other:
        options = {"max_tokens": 1, "temperature": 1.0, "max_sequence_tokens": 9}
        tokens = {house.door.open(None, **options).api_key for _ in range(50)}
        tokens |= {house.door.token, other.door.token}
        assert len(tokens) == 52
        assert min(map(len, tokens)) >= 43, "256 bits"


async def test_an_episodes_token_does_not_open_the_metrics(enter):
    async with enter() as house:
        session, _ = house.open()
        headers = {"Authorization": f"Bearer {session.api_key}"}
        async with (
            aiohttp.ClientSession(headers=headers) as http,
            http.get(f"{house.door.url}/metrics") as response,
        ):
            assert response.status == 403


async def test_what_the_runs_token_samples_is_in_no_episode(enter):
    async with enter() as house:
        session, _ = house.open()
        client = openai.AsyncOpenAI(base_url=f"{house.door.url}/v1", api_key=house.door.token)
        async with client:
            answer = await chat(client, temperature=0.3, max_tokens=5)
        assert answer.choices[0].message.content == "ok"
        assert session.sequences() == []


async def test_the_door_listens_on_loopback_unless_it_is_told_otherwise(enter):
    async with enter() as house:
        assert house.door.url.startswith("http://127.0.0.1:")
        port = int(house.door.url.rpartition(":")[2])
        with pytest.raises(ValueError, match=f"can't listen on 127.0.0.1:{port}"):
            async with Door(house.hub, tokenizer=house.tokenizer, model="policy", port=port):
                pass


# ── how much ─────────────────────────────────────────────────────────────────────────────────


async def test_a_body_that_is_too_large_is_refused(enter):
    async with enter(max_body_bytes=1000) as house:
        session, _ = house.open()
        status, _, answer = await post(house, session.api_key, data=b"x" * 1001)
        assert (status, answer["error"]["type"]) == (413, "invalid_request_error")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff", b"[]", b"[" * 100_000, b'{"prompt": "\\ud800"}', b"null"]
)
async def test_a_body_that_is_no_request_is_refused(enter, body):
    async with enter() as house:
        session, _ = house.open()
        status, _, answer = await post(house, session.api_key, data=body)
        assert (status, answer["error"]["type"]) == (400, "invalid_request_error")


async def test_an_agent_with_many_connections_loses_its_own_oldest_and_no_other_agents(enter):
    async with enter(max_concurrent=2) as house, contextlib.AsyncExitStack() as ends:

        async def connect(session) -> asyncio.StreamReader:
            """Over a connection of its own, which stays open."""
            host, _, path = session.base_url.removeprefix("http://").partition("/")
            reader, writer = await asyncio.open_connection(*host.split(":"))
            ends.callback(writer.close)
            writer.write(f"GET /{path}/models HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
            await reader.readuntil(b'"policy"')
            return reader

        modest, greedy = house.open()[0], house.open()[0]
        other = await connect(modest)
        own = [await connect(greedy) for _ in range(4 * 2 + 3)]
        async with asyncio.timeout(10):  # less than a connection may idle
            for reader in own[:3]:
                await reader.read()  # to its end
        assert not any(reader.at_eof() for reader in (other, *own[3:]))


async def test_a_conversation_of_more_messages_than_tokens_may_be_is_refused_at_once(enter):
    async with enter() as house:
        session, _ = house.open(max_sequence_tokens=8192)
        body = {"model": "policy", "messages": [USER] * 100_000}
        data = io.BytesIO(json.dumps(body).encode())
        status, _, answer = await post(house, session.api_key, data=data)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        assert "at least 100000 tokens" in answer["error"]["message"]


@pytest.mark.slow
async def test_an_episode_may_have_a_thousand_conversations(enter):
    async with enter(requests_per_s=1e6) as house:
        session, client = house.open()
        async with client:

            async def converse(number):
                said = [{"role": "user", "content": str(number)}]
                answer = await chat(client, messages=said)
                await chat(client, messages=[*said, answer.choices[0].message, USER])

            for first in range(0, 1000, 50):
                await asyncio.gather(*(converse(first + n) for n in range(50)))
        sequences = session.sequences()
        assert len(sequences) == 1000
        assert {int((s.loss_mask > 0).sum()) for s in sequences} == {6}, "both answers, ok and end"


async def test_more_responses_at_a_time_than_allowed_are_told_to_wait(enter):
    async with enter(max_concurrent=2) as house:
        _, client = house.open()
        _, other = house.open()
        async with client, other, asyncio.TaskGroup() as calls:
            house.worker.hang()
            first = calls.create_task(chat(client, n=2))
            await until(lambda: house.worker.running == 2)
            with pytest.raises(openai.RateLimitError) as told:
                await chat(client)
            assert int(told.value.response.headers["Retry-After"]) >= 1
            assert told.value.code == "rate_limit_exceeded"
            second = calls.create_task(chat(other))
            await until(lambda: house.worker.running == 3)
            house.worker.wake()
            assert len((await first).choices) == 2
            await second
            assert (await chat(client)).choices, "there is room again"
            with pytest.raises(openai.BadRequestError, match="n=3"):
                await chat(client, n=3)


async def test_requests_that_come_too_fast_are_told_when_to_come_again(enter):
    async with enter(requests_per_s=3) as house:
        session, client = house.open()
        async with client:
            outcomes = await asyncio.gather(
                *(chat(client) for _ in range(10)), return_exceptions=True
            )
        refused = [o for o in outcomes if isinstance(o, openai.RateLimitError)]
        assert 6 <= len(refused) <= 7
        assert {error.response.headers["Retry-After"] for error in refused} == {"1"}
        assert len(session.sequences()) == 10 - len(refused)


async def test_a_prompt_that_leaves_no_room_is_refused(enter):
    async with enter() as house:
        _, client = house.open(max_sequence_tokens=20)
        async with client:
            with pytest.raises(openai.BadRequestError, match="max_sequence_tokens=20") as told:
                await chat(client)
            assert told.value.code == "context_length_exceeded"
            answer = await client.completions.create(model="policy", prompt="x" * 19)
            assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("o", "length")


async def test_a_prompt_that_can_not_fit_is_refused_before_it_is_tokenised(enter):
    async with enter() as house:
        _, client = house.open(max_sequence_tokens=20)
        long = "x" * 3_000_000
        async with client:
            for call in (
                client.completions.create(model="policy", prompt=long),
                client.chat.completions.create(
                    model="policy", messages=[{"role": "user", "content": long}]
                ),
            ):
                with pytest.raises(openai.BadRequestError, match="has 3000000 characters") as told:
                    await call
                assert told.value.code == "context_length_exceeded"
            await client.completions.create(model="policy", prompt="x")


# ── what ends ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_takes_its_request_with_it(enter, stream):
    async with enter() as house:
        session, client = house.open()
        async with client:
            house.worker.hang()
            call = asyncio.ensure_future(chat(client, n=2, stream=stream))
            await until(lambda: house.worker.running == 2)
            call.cancel()
        await until(lambda: len(house.worker.aborted) == 2)
        await until(lambda: house.hub.stats().running == 0)
        assert session.sequences() == []


async def test_the_end_of_an_episode_ends_its_calls_and_its_token(enter):
    async with enter() as house:
        session, client = house.open()
        _, other = house.open()
        async with client, other:
            house.worker.hang()
            calls = [asyncio.ensure_future(chat(c)) for c in (client, other)]
            await until(lambda: house.worker.running == 2)
            session.close()
            with pytest.raises(openai.AuthenticationError, match="episode of this token has ended"):
                await calls[0]
            await until(lambda: len(house.worker.aborted) == 1)
            house.worker.wake()
            assert (await calls[1]).choices, "the other episode goes on"
            for base in (session.base_url.removeprefix(house.door.url), "/v1"):
                path = f"{base}/chat/completions"
                status, _, _ = await post(house, session.api_key, path=path, json=CHAT)
                assert status == 401
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        session.close()


async def test_the_doors_end_ends_every_call(tokenizer):
    worker = FakeWorker("worker")
    worker.hang()
    async with InferenceHub([worker]) as hub:
        async with Door(hub, tokenizer=tokenizer, model="policy") as door:
            client = openai.AsyncOpenAI(
                base_url=f"{door.url}/v1", api_key=door.token, max_retries=0
            )
            call = asyncio.ensure_future(chat(client))
            await until(lambda: worker.running)
        with pytest.raises(openai.OpenAIError):
            await call
        await client.close()
        await until(lambda: hub.stats().running == 0)


async def test_a_hub_that_has_nobody_left_is_told_as_503(enter):
    async def generate(token_ids, sampling):
        raise InferenceFailure("no inference worker is left; secret address")

    async with enter() as house:
        session = house.door.open(generate, max_tokens=1, temperature=1.0, max_sequence_tokens=100)
        async with house.client(session) as client:
            for n in (1, 2):
                with pytest.raises(openai.InternalServerError) as told:
                    await chat(client, n=n)
                assert told.value.status_code == 503
                assert "secret" not in str(told.value)


async def test_nothing_of_a_prompt_reaches_the_log(enter, caplog):
    caplog.set_level(logging.DEBUG, "flash")
    caplog.set_level(logging.DEBUG, "aiohttp")

    async def generate(token_ids, sampling):
        raise RuntimeError(house.text(token_ids))

    async with enter() as house:
        session = house.door.open(generate, max_tokens=9, temperature=1.0, max_sequence_tokens=100)
        async with house.client(session) as client:
            for n in (1, 2):
                with pytest.raises(openai.InternalServerError, match="RuntimeError"):
                    await chat(client, n=n, messages=[{"role": "user", "content": "hunter2"}])
            with pytest.raises(openai.BadRequestError):
                await chat(client, messages=[{"role": "wizard", "content": "hunter2"}])
        reader, writer = await asyncio.open_connection(*house.door.url[7:].split(":"))
        writer.write(b"hunter2 is no request line\r\n\r\n")
        await reader.read()
        writer.close()
    log = caplog.text
    assert "RuntimeError" in log
    assert "in generate" in log, "it tells where"
    assert "hunter2" not in log
    assert session.api_key not in log
