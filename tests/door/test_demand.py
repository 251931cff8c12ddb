"""What clients demand of an answer: taken where the workers can, refused by name where not."""

import json
from typing import Literal

import anthropic
import openai
import pytest
from pydantic import BaseModel

from flash.door.errors import ApiError
from flash.door.schema import Ignore, parse_chat

USER = {"role": "user", "content": "where?"}
SCHEMA = {
    "type": "object",
    "properties": {"to": {"type": "string"}},
    "required": ["to"],
    "additionalProperties": False,
}
OTHER = {"type": "object", "properties": {"n": {"type": "integer"}}}
MOVE = {"name": "move", "parameters": SCHEMA}
WAIT = {"name": "wait", "parameters": OTHER}
TOOLS = [{"type": "function", "function": tool} for tool in (MOVE, WAIT)]
SAID = '<tool_call>\n{"name": "move", "arguments": {"to": "x"}}\n</tool_call><|im_end|>'
JSON = '{"to": "x"}<|im_end|>'


class Place(BaseModel):
    to: Literal["x", "y"]


def as_responses(tools):
    return [{"type": "function", **tool["function"]} for tool in tools]


def as_anthropic(tools):
    return [
        {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]}
        for tool in tools
    ]


async def chat(house, session, **asked):
    async with openai.AsyncOpenAI(
        base_url=session.base_url, api_key=session.api_key, max_retries=0
    ) as client:
        return await client.chat.completions.create(model="policy", messages=[USER], **asked)


async def respond(house, session, **asked):
    async with openai.AsyncOpenAI(
        base_url=session.base_url, api_key=session.api_key, max_retries=0
    ) as client:
        return await client.responses.create(model="policy", input="where?", **asked)


async def message(house, session, **asked):
    async with anthropic.AsyncAnthropic(
        base_url=session.anthropic_base_url, api_key=session.api_key, max_retries=0
    ) as client:
        return await client.messages.create(
            model="policy", max_tokens=200, messages=[USER], **asked
        )


def strict(tool):
    return {"type": "function", "function": {**tool, "strict": True}}


NAMED = {"type": "function", "function": {"name": "move"}}
ALLOWED = {
    "type": "allowed_tools",
    "allowed_tools": {"mode": "auto", "tools": [NAMED]},
}
# How each client asks for it, the field that is told, what is said.
DEMANDS = [
    (chat, "tool_choice", {"tools": TOOLS, "tool_choice": "required"}, SAID),
    (chat, "tool_choice", {"tools": TOOLS, "tool_choice": NAMED}, SAID),
    (chat, "tool_choice", {"tools": TOOLS, "tool_choice": ALLOWED}, SAID),
    (chat, "tools[1].function.strict", {"tools": [TOOLS[1], strict(MOVE)]}, SAID),
    (chat, "parallel_tool_calls", {"tools": TOOLS, "parallel_tool_calls": False}, SAID),
    (chat, "response_format", {"response_format": {"type": "json_object"}}, JSON),
    (
        chat,
        "response_format",
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "place", "schema": SCHEMA, "strict": True},
            }
        },
        JSON,
    ),
    (respond, "tool_choice", {"tools": as_responses(TOOLS), "tool_choice": "required"}, SAID),
    (
        respond,
        "tool_choice",
        {"tools": as_responses(TOOLS), "tool_choice": {"type": "function", "name": "move"}},
        SAID,
    ),
    (
        respond,
        "tool_choice",
        {
            "tools": as_responses(TOOLS),
            "tool_choice": {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "move"}],
            },
        },
        SAID,
    ),
    (
        respond,
        "tools[0].strict",
        {"tools": [{**tool, "strict": True} for tool in as_responses(TOOLS)]},
        SAID,
    ),
    (respond, "text.format", {"text": {"format": {"type": "json_object"}}}, JSON),
    (
        respond,
        "text.format",
        {"text": {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA}}},
        JSON,
    ),
    (message, "tool_choice", {"tools": as_anthropic(TOOLS), "tool_choice": {"type": "any"}}, SAID),
    (
        message,
        "tool_choice",
        {"tools": as_anthropic(TOOLS), "tool_choice": {"type": "tool", "name": "move"}},
        SAID,
    ),
    (
        message,
        "tool_choice.disable_parallel_tool_use",
        {
            "tools": as_anthropic(TOOLS),
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        },
        SAID,
    ),
    (
        message,
        "tools[0].strict",
        {"tools": [{**tool, "strict": True} for tool in as_anthropic(TOOLS)]},
        SAID,
    ),
    (
        message,
        "output_config.format",
        {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
        JSON,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("ask", "field", "asked", "said"), DEMANDS)
async def test_a_demand_reaches_workers_that_can_and_what_they_say_is_not_trained_on(
    enter, ask, field, asked, said
):
    async with enter(constrains=True) as house:
        session, _ = house.open()
        house.says = [said]
        await ask(house, session, **asked)
        (sampling,) = house.samplings
        assert "structural_tag" in sampling.constraint
        (sequence,) = session.sequences()
        assert not sequence.loss_mask.any()
        assert [house.text(ids) for sampled, ids in sequence.runs() if sampled] == [said]


@pytest.mark.parametrize(("ask", "field", "asked", "said"), DEMANDS)
async def test_workers_that_can_not_are_asked_for_nothing_and_the_field_is_told(
    enter, ask, field, asked, said
):
    async with enter() as house:
        session, _ = house.open()
        with pytest.raises((openai.BadRequestError, anthropic.BadRequestError)) as told:
            await ask(house, session, **asked)
        assert f"{field}=" in str(told.value)
        assert "agent.ignore" in str(told.value)
        assert not house.prompts


@pytest.mark.parametrize(("ask", "field", "asked", "said"), DEMANDS)
async def test_what_the_door_is_to_overlook_is_sampled_freely_and_trained_on(
    enter, ask, field, asked, said
):
    async with enter(constrains=True, ignore=["*"]) as house:
        session, _ = house.open()
        house.says = [said]
        await ask(house, session, **asked)
        assert house.samplings[0].constraint is None
        assert session.sequences()[0].loss_mask.any()


def form(house) -> dict:
    """Of the only request."""
    (sampling,) = house.samplings
    return json.loads(sampling.constraint)["format"]["elements"][1]


async def test_a_demanded_call_is_in_the_models_own_words_with_its_schema(enter):
    async with enter(constrains=True) as house:
        session, _ = house.open()
        house.says = [f"<think>far</think>\n{SAID}"]
        answer = await chat(house, session, tools=TOOLS, tool_choice="required")
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("move", {"to": "x"})
        assert form(house) == {
            "type": "tags_with_separator",
            "separator": "",
            "at_least_one": True,
            "stop_after_first": False,
            "tags": [
                {
                    "type": "tag",
                    "begin": f'<tool_call>\n{{"name": "{tool["name"]}", "arguments": ',
                    "content": {
                        "type": "json_schema", "json_schema": tool["parameters"], "style": "json",
                    },
                    "end": "}\n</tool_call>",
                }
                for tool in (MOVE, WAIT)
            ],
        }  # fmt: skip


async def test_one_tool_that_is_named_is_called_once(enter):
    async with enter(constrains=True) as house:
        session, _ = house.open()
        await chat(house, session, tools=TOOLS, tool_choice=NAMED)
        assert form(house)["stop_after_first"]
        assert ["move" in tag["begin"] for tag in form(house)["tags"]] == [True]


async def test_of_tools_that_may_be_called_only_the_strict_ones_keep_to_their_schema(enter):
    async with enter(constrains=True) as house:
        session, _ = house.open()
        await chat(house, session, tools=[strict(MOVE), TOOLS[1]])
        told = form(house)
        assert (told["type"], told["triggers"]) == ("triggered_tags", ["<tool_call>"])
        assert not told["at_least_one"]
        schemas = [tag["content"]["json_schema"] for tag in told["tags"]]
        assert schemas == [SCHEMA, {"type": "object"}]


async def test_with_tools_an_answer_is_a_call_or_keeps_to_its_schema(enter):
    async with enter(constrains=True) as house:
        session, _ = house.open()
        asked = {"tools": TOOLS, "response_format": {"type": "json_object"}}
        await chat(house, session, **asked)
        calls, words = form(house)["elements"]
        assert (calls["type"], calls["at_least_one"]) == ("tags_with_separator", True)
        assert words == {"type": "json_schema", "json_schema": {"type": "object"}}
        house.samplings.clear()
        await chat(house, session, **asked, tool_choice="none")
        assert form(house) == words


@pytest.mark.parametrize(
    ("opening", "thought"),
    [
        ("", "optional"),  # it thinks if it likes
        ("<think>\n", "sequence"),  # it does: the prompt has begun it
        ("<think>\n\n</think>\n\n", None),  # it does not
    ],
)
async def test_a_constraint_comes_after_the_thought(enter, opening, thought):
    async with enter(constrains=True) as house:
        session, _ = house.open()
        house.tokenizer.chat_template = house.tokenizer.chat_template.replace(
            "<|im_start|>assistant\n{% endif %}", f"<|im_start|>assistant\n{opening}{{% endif %}}"
        )
        await chat(house, session, response_format={"type": "json_object"})
        told = json.loads(house.samplings[0].constraint)["format"]
        if thought is None:
            assert told["type"] == "json_schema"
        else:
            first, last = told["elements"]
            assert (first["type"], last["type"]) == (thought, "json_schema")
            first = first.get("content", first)
            assert first["elements"][0]["begin"] == ("<think>" if thought == "optional" else "")
            assert first["elements"][0]["end"] == "</think>"


async def test_where_a_thought_ends_must_be_known_in_plain_words(enter, tokenizer):
    fields = tokenizer.response_template["fields"]
    thinking = {"open_pattern": "<think>", "close": "</think>", "content": "text"}
    tokenizer.response_template = {
        **tokenizer.response_template, "fields": {**fields, "thinking": thinking},
    }  # fmt: skip
    async with enter(constrains=True) as house:
        session, _ = house.open()
        with pytest.raises(openai.BadRequestError, match="response_format=.*thoughts end"):
            await chat(house, session, response_format={"type": "json_object"})


async def test_a_model_whose_calls_are_not_known_can_not_be_made_to_call(enter, tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace('{"name": "', '{"tool": "')
    async with enter(constrains=True) as house:
        session, _ = house.open()
        with pytest.raises(openai.BadRequestError, match="tool_choice=.*chat template writes"):
            await chat(house, session, tools=TOOLS, tool_choice="required")


async def test_an_episode_trains_on_what_was_said_without_constraint(enter):
    """Of one conversation, in one sample."""
    async with enter(constrains=True) as house:
        session, client = house.open()
        house.says = ["first<|im_end|>", JSON, "last<|im_end|>"]
        messages = [USER]
        for asked in ({}, {"response_format": {"type": "json_object"}}, {}):
            answer = await client.chat.completions.create(
                model="policy", messages=messages, **asked
            )
            messages += [answer.choices[0].message, USER]
        (sequence,) = session.sequences()
        trained = sequence.token_ids[sequence.loss_mask > 0]
        assert house.text(trained) == "first<|im_end|>last<|im_end|>"
        assert sorted(set(sequence.turns)) == [-1, 0, 1, 2]
        assert len(sequence.sampled_versions()) == len(trained)


async def test_what_the_workers_refuse_is_told_by_the_field(enter):
    async with enter(constrains=True) as house:

        async def refuse(*_):
            raise ValueError("the grammar has too many states")

        session = house.door.open(refuse, max_tokens=9, temperature=1.0, max_sequence_tokens=1000)
        with pytest.raises(openai.BadRequestError, match="response_format=.*too many states"):
            await chat(house, session, response_format={"type": "json_object"})


async def test_the_clients_own_schemas_are_parsed_by_the_clients(enter):
    async with enter(constrains=True) as house:
        _, client = house.open()
        house.says = [JSON] * 2
        asked = {"model": "policy", "messages": [USER]}
        answer = await client.chat.completions.parse(**asked, response_format=Place)
        assert answer.choices[0].message.parsed == Place(to="x")
        answer = await client.responses.parse(model="policy", input="where?", text_format=Place)
        assert answer.output_parsed == Place(to="x")
        assert answer.text.format.name == "Place"


# ── the schemas ──────────────────────────────────────────────────────────────────────────────


def parse(**fields):
    body = {"model": "policy", "messages": [USER], **fields}
    return parse_chat(body, model="policy", ignore=Ignore([]))


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"type": "strin"}, "the schema is none"),
        ({"not": {"type": "string"}}, "'not'"),
        ({"properties": {"a": {"type": "array", "uniqueItems": True}}}, "'uniqueItems'"),
        ({"anyOf": [{"type": "string"}, {"multipleOf": 2}]}, "'multipleOf'"),
        ({"allOf": [{"type": "string"}, {"minLength": 2}]}, "'allOf'"),
    ],
)
def test_a_schema_that_no_grammar_keeps_to_is_refused(schema, why):
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(ApiError, match=why) as told:
        parse(response_format=given)
    assert told.value.param == "response_format"
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    with pytest.raises(ApiError, match=why) as told:
        parse(tools=[tool])
    assert told.value.param == "tools[0].function.strict"


def test_names_and_data_of_a_schema_are_no_keywords():
    schema = {"properties": {"not": {"enum": [{"if": 1}]}, "contains": {"const": {"then": 2}}}}
    given = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert parse(response_format=given).demand.answer == schema


def test_a_demanded_call_needs_a_tool_and_a_name_that_is_there():
    with pytest.raises(ApiError, match="there are no tools"):
        parse(tool_choice="required")
    unknown = {"type": "function", "function": {"name": "fly"}}
    with pytest.raises(ApiError, match="no tool has the name 'fly'"):
        parse(tools=TOOLS, tool_choice=unknown)


def test_without_a_call_to_make_nothing_is_demanded_of_calls():
    assert parse(parallel_tool_calls=False).demand is None
    assert parse(tools=[strict(MOVE)], tool_choice="none").demand is None
