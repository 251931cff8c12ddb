"""A field is honoured, means nothing here, or is refused by name, with its value and a remedy."""

import contextlib
import typing

import numpy as np
import openai
import pytest
from openai.types.chat import completion_create_params as chat_params

from flash.door import ApiError
from flash.door.schema import IGNORABLE, as_template, parse_chat, parse_text
from flash.door.server import Door

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f"}}


def chat(*, ignore=(), **fields):
    return parse_chat(
        {"model": "policy", "messages": [USER], **fields}, model="policy", ignore=ignore
    )


def text(**fields):
    return parse_text({"model": "policy", "prompt": "x", **fields}, model="policy", ignore=())


def refusal(parse, **fields) -> ApiError:
    with pytest.raises(ApiError) as told:
        parse(**fields)
    return told.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("top_p", 0.9), ("top_p", True), ("frequency_penalty", 0.1), ("presence_penalty", -1),
        ("logit_bias", {"5": 1}), ("seed", 7), ("top_logprobs", 3),
        ("response_format", {"type": "json_object"}), ("parallel_tool_calls", False),
        ("modalities", ["text", "audio"]), ("service_tier", "priority"), ("store", True),
        ("reasoning_effort", "low"), ("verbosity", "low"), ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}), ("n", 0), ("n", True),
        ("n", 1.5), ("max_tokens", 0), ("max_tokens", "9"), ("temperature", -1),
        ("temperature", float("nan")), ("stop", ""), ("stop", ["a"] * 5), ("stop", [1]),
        ("stream", "yes"), ("stream_options", {"include_obfuscation": True}), ("logprobs", 2),
        ("audio", {}), ("prediction", {}), ("web_search_options", {}), ("functions", []),
        ("function_call", "auto"), ("moderation", {}), ("chat_template_kwargs", {}), ("top_k", 5),
        ("messages", []), ("messages", "hi"), ("model", 7),
    ],
)  # fmt: skip
def test_a_value_that_can_not_be_honoured_is_refused_by_name(field, value):
    told = refusal(chat, **{field: value})
    assert (told.status, told.param.partition("[")[0].partition(".")[0]) == (400, field)
    assert f"{told.param}=" in str(told)
    assert told.body()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_of", 2), ("echo", True), ("suffix", "end"), ("logprobs", 1), ("prompt", ["a", "b"]),
        ("prompt", [[1], [2]]), ("prompt", [-1]), ("prompt", [1.5]), ("messages", [USER]),
    ],
)  # fmt: skip
def test_so_it_is_for_texts(field, value):
    told = refusal(text, **{field: value})
    assert told.param.partition("[")[0].partition(".")[0] == field


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "wizard", "content": "x"}, "messages[1].role"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[1].content[0].type"),
        ({"role": "user", "content": 7}, "messages[1].content"),
        ({"role": "user", "content": "x", "mood": 1}, "messages[1].mood"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[1].tool_calls[0].function"),
        ({"role": "assistant", "audio": {"id": "x"}}, "messages[1].audio"),
    ],
)  # fmt: skip
def test_a_message_at_fault_is_named_by_its_place(message, param):
    told = refusal(chat, messages=[USER, message])
    assert told.param.startswith(param)


def test_no_value_and_null_are_the_same_and_labels_say_nothing():
    assert chat() == chat(
        temperature=None, top_p=None, seed=None, tools=None, n=None, stream_options=None,
        user="me", metadata={"a": "b"}, safety_identifier="x", prompt_cache_key="k",
        top_logprobs=None, max_completion_tokens=None,
    )  # fmt: skip


def test_a_value_that_asks_for_what_happens_anyway_is_taken():
    assert chat() == chat(
        top_p=1.0, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, top_logprobs=0,
        response_format={"type": "text"}, parallel_tool_calls=True, modalities=["text"],
        service_tier="auto", store=False, n=1, stop=[], stream=False, tool_choice="auto",
    )  # fmt: skip
    assert text() == text(best_of=1, echo=False, suffix="")


def test_a_field_may_be_ignored_if_the_door_was_told_to():
    assert chat(temperature=0.1).temperature == 0.1
    heedless = chat(ignore={"temperature", "seed"}, temperature=0.1, seed=3)
    assert heedless == chat()
    strict = {"type": "function", "function": {"name": "f", "strict": True}}
    assert refusal(chat, tools=[strict]).param == "tools[0].function.strict"
    assert chat(ignore={"strict"}, tools=[strict]).tools == [TOOL]
    assert chat(ignore={"model"}, model="gpt-4o") == chat()
    with pytest.raises(ValueError, match=r"ignore=\['messages'\].*'temperature'"):
        Door(None, tokenizer=None, model="policy", ignore=["messages"])


def test_another_model_is_not_found():
    told = refusal(chat, model="gpt-4o")
    assert (told.status, told.code, told.param) == (404, "model_not_found", "model")


def test_two_limits_must_agree():
    assert chat(max_tokens=3, max_completion_tokens=3).max_tokens == 3
    assert refusal(chat, max_tokens=3, max_completion_tokens=4).param == "max_tokens"


def test_what_is_missing_is_named():
    told = refusal(lambda: parse_chat({"model": "policy"}, model="policy", ignore=()))
    assert (told.param, told.code) == ("messages", "missing_required_parameter")


def test_every_field_that_the_official_client_knows_is_known_here():
    """A field of a newer client is refused as unknown; then this list is what to look at."""
    known = {
        name
        for shape in (chat_params.CompletionCreateParamsBase,)
        for name in typing.get_type_hints(shape)
    }
    refused_by_name = {
        "audio", "function_call", "functions", "moderation", "prediction", "web_search_options",
    }  # fmt: skip
    for name in known - refused_by_name - {"model", "messages"}:
        chat(**{name: None})
        with contextlib.suppress(ApiError):
            chat(**{name: []})
            continue
        assert "does not know the field" not in str(refusal(chat, **{name: []})), name


def test_messages_become_what_templates_take():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    function = {"name": "f", "arguments": '{"x": 1}'}
    broken = {"name": "f", "arguments": "{x"}
    asked = chat(
        messages=[
            {"role": "developer", "content": "be good"},
            {"role": "user", "content": parts, "name": "me"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": function},
                    {"id": "2", "type": "function", "function": broken},
                ],
            },
            {"role": "tool", "tool_call_id": "1", "content": "ok"},
        ]
    )
    assert asked.messages == [
        {"role": "system", "content": "be good"},
        {"role": "user", "content": "ab", "name": "me"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
                {"id": "2", "type": "function", "function": broken},
            ],
        },
        {"role": "tool", "content": "ok", "tool_call_id": "1"},
    ]


def test_a_message_that_was_given_out_comes_back_the_same():
    message = openai.types.chat.ChatCompletionMessage.model_validate(
        {"role": "assistant", "content": "x", "refusal": None, "reasoning_content": "y"}
    )
    back = message.model_dump()
    assert chat(messages=[back]).messages == [as_template(back)]


async def test_the_episodes_temperature_is_the_only_one(enter):
    async with enter() as house:
        session, client = house.open(temperature=0.7)
        async with client:
            options = {"model": "policy", "messages": [USER]}
            await client.chat.completions.create(temperature=0.7, **options)
            with pytest.raises(openai.BadRequestError, match=r"temperature=0.2: .* samples at 0.7"):
                await client.chat.completions.create(temperature=0.2, **options)
        (sequence,) = session.sequences()
        sampled = sequence.loss_mask > 0
        assert set(sequence.temperatures[sampled]) == {np.float32(0.7)}


async def test_a_models_limits_are_told(enter, tokenizer):
    tokenizer.response_template = None
    options = {"model": "policy", "messages": [USER], "tools": [TOOL]}
    async with enter() as house:
        _, client = house.open()
        async with client:
            with pytest.raises(openai.BadRequestError, match="response_template"):
                await client.chat.completions.create(**options)
            await client.chat.completions.create(tool_choice="none", **options)
            with pytest.raises(openai.BadRequestError, match="prompt=100000: there are"):
                await client.completions.create(model="policy", prompt=[100_000])
            with pytest.raises(openai.BadRequestError, match="no tokens"):
                await client.completions.create(model="policy", prompt="")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    async with enter() as house:
        _, client = house.open()
        async with client:
            with pytest.raises(openai.BadRequestError, match="template does not show them"):
                await client.chat.completions.create(**options)
    tokenizer.chat_template = None
    async with enter() as house:
        _, client = house.open()
        async with client:
            with pytest.raises(openai.BadRequestError, match="use /v1/completions"):
                await client.chat.completions.create(**options)
            await client.completions.create(model="policy", prompt="x")


def test_what_can_be_ignored_is_what_can_be_refused():
    for name in IGNORABLE - {"model", "temperature", "strict"}:
        value = {"never": "this"}
        assert refusal(chat, **{name: value}).param == name
        assert chat(ignore={name}, **{name: value}) == chat()
