"""A field is honoured, means nothing here, or is refused by name, with its value and a remedy."""

import contextlib
import typing

import numpy as np
import openai
import pytest
from openai.types.chat import completion_create_params as chat_params

from flash.door import ApiError
from flash.door.openai import error_body
from flash.door.schema import Ignore, as_template, parse_chat, parse_text
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
        ("response_format", {"type": "yaml"}),
        ("parallel_tool_calls", "no"),
        ("modalities", ["text", "audio"]), ("service_tier", "priority"), ("store", True),
        ("reasoning_effort", "low"), ("verbosity", "low"), ("tool_choice", "required"),
        ("tool_choice", "always"), ("tool_choice", {"type": "custom"}),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}), ("n", 0), ("n", True),
        ("n", 1.5), ("max_tokens", 0), ("max_tokens", "9"), ("temperature", -1),
        ("temperature", float("nan")), ("stop", ""), ("stop", ["a"] * 5), ("stop", [1]),
        ("stream", "yes"), ("stream_options", {"include_obfuscation": True}), ("logprobs", 2),
        ("audio", {}), ("prediction", {}), ("web_search_options", {}), ("functions", []),
        ("function_call", "auto"), ("moderation", {}), ("top_k", 5), ("min_p", 0.1),
        ("repetition_penalty", 1.1), ("reasoning", {"effort": "low"}), ("chat_template_kwargs", 7),
        ("chat_template", "{}"),
        ("messages", []), ("messages", "hi"), ("model", 7),
    ],
)  # fmt: skip
def test_a_value_that_can_not_be_honoured_is_refused_by_name(field, value):
    told = refusal(chat, **{field: value})
    assert (told.status, told.param.partition("[")[0].partition(".")[0]) == (400, field)
    assert f"{told.param}=" in str(told)
    assert error_body(told)["error"]["type"] == "invalid_request_error"


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
    assert chat(tools=[strict]).demand is not None
    assert chat(ignore={"strict"}, tools=[strict]).demand is None
    assert chat(ignore={"strict"}, tools=[strict]).tools == [TOOL]
    assert chat(ignore={"model"}, model="gpt-4o") == chat()
    assert chat(ignore={"tool_choice"}, tool_choice="required", tools=[TOOL]).parse_tools
    assert not chat(ignore={"tool_choice"}, tool_choice="none", tools=[TOOL]).parse_tools, (
        "honoured"
    )
    image = {"type": "image_url", "image_url": {"url": "data:,"}}
    shown = {"role": "user", "content": [{"type": "text", "text": "hi"}, image]}
    assert "image_url" in str(refusal(chat, messages=[shown]))
    assert chat(ignore={"image_url"}, messages=[shown]) == chat()
    for honoured in ("messages", "content", "tools", "stop", "chat_template_kwargs"):
        with pytest.raises(ValueError, match=f"'{honoured}'. can't be ignored"):
            Door(None, tokenizer=None, model="policy", ignore=[honoured])


def test_everything_that_is_not_honoured_may_be_ignored_at_once():
    everything = Ignore(["*"])
    strict = {"type": "function", "function": {"name": "f", "strict": True}, "defer_loading": True}
    heedless = chat(
        ignore=everything, model="gpt-4o", temperature=0.1, top_p=0.5, top_k=5, min_p=0.1,
        repetition_penalty=1.1, seed=3, reasoning={"effort": "low"}, reasoning_effort="low",
        response_format={"type": "json_object"}, tool_choice="required", tools=[strict],
        never_heard_of=1, messages=[{**USER, "mood": 1}],
    )  # fmt: skip
    assert heedless == chat(tools=[TOOL])
    asked = {"n": 2, "stop": ["x"], "max_tokens": 3, "logprobs": True}
    asked |= {"chat_template_kwargs": {"deep": True}, "messages": [USER, USER]}
    assert chat(ignore=everything, **asked) == chat(**asked), "what is honoured"
    for name, value in {"functions": [TOOL], "chat_template": "x", "documents": [{}]}.items():
        assert refusal(chat, ignore=everything, **{name: value}).param == name
        assert chat(ignore={name}, **{name: value}) == chat()


def test_fields_may_be_ignored_by_a_pattern_but_not_what_is_honoured_or_has_to_be_named():
    fits = Ignore(["x_*", "*_penalty", "st*", "doc*"])
    assert (
        chat(ignore=fits, x_trace="1", frequency_penalty=2, messages=[{**USER, "x_y": 1}]) == chat()
    )
    assert refusal(chat, ignore=fits, trace="1").param == "trace"
    assert chat(ignore=fits, stop=["x"]).stop == ("x",), "honoured"
    assert refusal(chat, ignore=fits, documents=[{}]).param == "documents"


STREAMED = {  # as the official client's stream helper gives it
    "role": "assistant", "content": "I call", "refusal": None, "annotations": None, "audio": None,
    "function_call": None, "parsed": None,
    "tool_calls": [
        {
            "id": "1", "type": "function", "index": 0,
            "function": {"name": "f", "arguments": "{}", "parsed_arguments": None},
        }
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {}, {"annotations": []}, {"refusal": ""}, {"parsed": {"x": 1}}, {"name": None},
        {"provider_specific_fields": None}, {"cache_control": {"type": "ephemeral"}},
        {"content": [{"type": "text", "text": "I call", "cache_control": {"type": "ephemeral"}}]},
    ],
)  # fmt: skip
def test_a_message_that_a_client_made_of_a_stream_is_what_was_given_out(more):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    plain = {"role": "assistant", "content": "I call", "tool_calls": [call]}
    assert chat(messages=[USER, {**STREAMED, **more}]) == chat(messages=[USER, plain])


def test_reasoning_has_two_names():
    old = {"role": "assistant", "content": "x", "reasoning_content": "why"}
    new = {"role": "assistant", "content": "x", "reasoning": "why"}
    assert chat(messages=[old]) == chat(messages=[new])


async def test_variables_go_to_the_template_and_arguments_of_rendering_are_refused(
    enter, tokenizer
):
    tokenizer.chat_template = "{% if deep %}deep{% endif %}" + tokenizer.chat_template
    async with enter() as house:
        session, client = house.open()
        async with client:
            options = {"model": "policy", "messages": [USER]}
            for deep in (True, False):
                variables = {"chat_template_kwargs": {"deep": deep}}
                answer = await client.chat.completions.create(**options, extra_body=variables)
                assert house.text(house.prompts[-1]).startswith("deep") == deep
                said = answer.choices[0].message
                again = {"model": "policy", "messages": [USER, said, USER]}
                await client.chat.completions.create(**again, extra_body=variables)
            assert len(session.sequences()) == 2, "each conversation went on"
            for name in ("chat_template", "tools", "tokenize"):
                variables = {"chat_template_kwargs": {name: "x"}}
                with pytest.raises(openai.BadRequestError, match=f"chat_template_kwargs=.*{name}"):
                    await client.chat.completions.create(**options, extra_body=variables)


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({"stop": ["a"] * 5}, "at most 4"),
        ({"stream_options": {"include_obfuscation": True}}, "leave it out"),
        ({"messages": ["hi"]}, 'messages[0]="hi": Input should be a valid dictionary'),
        ({"tool_choice": "required"}, "agent.ignore"),
        ({"tools": [{"type": "custom"}]}, "ignore such parts by their type (agent.ignore)"),
        ({"messages": [{"role": "assistant", "refusal": "no"}]}, "agent.ignore"),
        ({"never_heard_of": 1}, "agent.ignore"),
    ],
)
def test_a_refusal_tells_the_remedy(fields, remedy):
    told = str(refusal(chat, **fields))
    assert remedy in told
    assert "_Message" not in told


def test_another_model_is_not_found():
    told = refusal(chat, model="gpt-4o")
    assert (told.status, told.code, told.param) == (404, "model_not_found", "model")


def test_two_limits_must_agree():
    assert chat(max_tokens=3, max_completion_tokens=3).max_tokens == 3
    assert refusal(chat, max_tokens=3, max_completion_tokens=4).param == "max_tokens"


def test_what_is_missing_is_named():
    told = refusal(lambda: parse_chat({"model": "policy"}, model="policy", ignore=()))
    assert (told.param, told.code) == ("messages", "missing_required_parameter")
    told = refusal(chat, response_format={"type": "json_schema"})
    assert told.param == "response_format.json_schema"


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
    for name in ("top_p", "seed", "response_format", "reasoning", "never_heard_of"):
        value = {"never": "this"}
        assert refusal(chat, **{name: value}).param == name
        assert chat(ignore={name}, **{name: value}) == chat()
