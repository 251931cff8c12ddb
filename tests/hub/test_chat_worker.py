"""A server of chat alone: what it is sent, and what is made of its answers."""

import contextlib

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flash.conversation import ChatTemplate
from flash.hub import chat_worker
from flash.hub.chat_worker import ChatWorker, framed
from flash.hub.worker import BadRequest, WorkerFailure
from flash.types import SamplingParams
from tests.tools.templates import HERMES, tokenizer_of

TALK = [
    {"role": "system", "content": "s ü"},
    {"role": "user", "content": "<|begins|> hi\n"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "<|im_end|>assistant"},
]


@pytest.fixture
def tokenizer():
    return framed(tokenizer_of(HERMES))


@pytest.fixture
def sampling(tokenizer):
    stops = ChatTemplate(tokenizer).stop_token_ids
    return SamplingParams(max_tokens=20, temperature=0.5, stop_token_ids=stops)


@contextlib.asynccontextmanager
async def worker(tokenizer, *answers):
    """A worker whose server gives these answers, and what it was asked."""
    asked, left = [], [*answers]

    async def chat(request):
        asked.append(await request.json())
        status, body = left.pop(0)
        return web.json_response(body, status=status)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    async with TestServer(app) as server:
        client = ChatWorker(str(server.make_url("")), model="m", tokenizer=tokenizer)
        try:
            yield client, asked
        finally:
            await client.close()


def says(text, why="stop"):
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": why}]}


async def test_a_conversation_is_read_back_from_its_tokens_as_it_was(tokenizer, sampling):
    prompt = ChatTemplate(tokenizer).prompt(TALK)
    async with worker(tokenizer, says("ö k")) as (client, asked):
        answer = await client.generate("r", prompt, sampling)
    assert asked == [{"model": "m", "messages": TALK, "max_tokens": 20, "temperature": 0.5}]
    assert tokenizer.decode(answer.token_ids[:-1]) == "ö k"
    assert answer.token_ids[-1] == tokenizer.eos_token_id
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize(
    ("answer", "tokens", "why"),
    [
        (says("abc", "length"), 3, "length"),
        (says("a" * 20), 20, "length"),
        (says(None), 1, "stop"),
        (says("ab", "tool_calls"), 3, "stop"),
    ],
)
async def test_an_answer_has_no_more_tokens_than_it_may(tokenizer, sampling, answer, tokens, why):
    prompt = ChatTemplate(tokenizer).prompt(TALK)
    async with worker(tokenizer, answer) as (client, _):
        completion = await client.generate("r", prompt, sampling)
    assert (len(completion.token_ids), completion.finish_reason) == (tokens, why)


async def test_a_limit_that_has_another_name_there_is_given_it_from_then_on(tokenizer, sampling):
    prompt = ChatTemplate(tokenizer).prompt(TALK)
    refused = 400, {"error": {"message": "use 'max_completion_tokens' instead"}}
    async with worker(tokenizer, refused, says("a"), says("b"), refused) as (client, asked):
        await client.generate("r", prompt, sampling)
        await client.generate("r", prompt, sampling)
        with pytest.raises(BadRequest):
            await client.generate("r", prompt, sampling)
    names = ["max_tokens", *["max_completion_tokens"] * 3]
    assert [next(name for name in body if name.startswith("max")) for body in asked] == names


async def test_who_has_had_enough_requests_is_asked_again_later(tokenizer, sampling, monkeypatch):
    monkeypatch.setattr(chat_worker, "_WAITS_S", (0, 0))
    prompt = ChatTemplate(tokenizer).prompt(TALK)
    busy = 429, {"error": {"message": "slow down"}}
    async with worker(tokenizer, busy, busy, says("a"), busy, busy, busy) as (client, _):
        assert (await client.generate("r", prompt, sampling)).finish_reason == "stop"
        with pytest.raises(WorkerFailure, match="slow down"):
            await client.generate("r", prompt, sampling)


async def test_what_is_no_conversation_or_no_answer_is_told(tokenizer, sampling):
    prompt = ChatTemplate(tokenizer).prompt(TALK)
    async with worker(tokenizer, (200, {"choices": []}), says("", "length")) as (client, asked):
        for nothing in (tokenizer.encode("hi"), prompt[-1:]):
            with pytest.raises(BadRequest, match="has chat alone"):
                await client.generate("r", nothing, sampling)
        assert not asked
        for _ in range(2):
            with pytest.raises(WorkerFailure):
                await client.generate("r", prompt, sampling)


def test_a_tokenizer_that_has_not_every_text_is_refused():
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "go": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ValueError, match="give --tokenizer NAME of a model with one of bytes"):
        framed(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))


def test_results_of_tools_are_refused_by_name(tokenizer):
    with pytest.raises(ValueError, match="results of tools are not told"):
        ChatTemplate(tokenizer).prompt([*TALK, {"role": "tool", "content": "r"}])
