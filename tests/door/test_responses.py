"""OpenAI's responses, with the official client, which knows nothing of us."""

import openai
import pytest
from pydantic import BaseModel

from flash.door.responses import Request
from flash.door.schema import ApiError, Ignore

TOOL = {
    "type": "function", "name": "look", "description": "looks", "strict": False,
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
}  # fmt: skip
CALL = (
    '<think>where</think>I look.<tool_call>{"name": "look", "arguments": {"at": "é"}}</tool_call>'
)
END = "<|im_end|>"
SAID = f"{CALL}{END}<think>so</think>It is there.{END}bye{END}"


async def answered(client, stream, **asked):
    if not stream:
        return await client.responses.create(model="policy", **asked)
    async with client.responses.stream(model="policy", **asked) as streamed:
        return await streamed.get_final_response()


def said_of(house, session):
    (sequence,) = session.sequences()
    return "".join(house.text(ids) for sampled, ids in sequence.runs() if sampled)


async def test_a_text_is_answered_and_recorded(enter):
    async with enter() as house:
        session, client = house.open()
        house.says = [f"hello{END}"]
        answer = await client.responses.create(
            model="policy", input="hi", instructions="be brief", metadata={"a": "b"}
        )
        assert (answer.output_text, answer.status) == ("hello", "completed")
        assert answer.usage.output_tokens == len("hello") + 1
        assert answer.usage.input_tokens == len(house.prompts[0])
        assert house.text(house.prompts[0]) == (
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert said_of(house, session) == f"hello{END}"


def as_objects(output):
    return list(output)


def as_dumped(output):
    return [item.model_dump() for item in output]


def as_json(output):
    return [item.model_dump(mode="json", exclude_none=True) for item in output]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("back", [as_objects, as_dumped, as_json])
async def test_a_loop_that_sends_all_items_again_is_one_sample(enter, stream, back):
    async with enter() as house:
        session, client = house.open()
        house.says = [CALL + END, f"<think>so</think>It is there.{END}", f"bye{END}"]
        items = [{"role": "user", "content": "find it"}]
        first = await answered(client, stream, input=items, tools=[TOOL])
        assert [item.type for item in first.output] == ["reasoning", "message", "function_call"]
        call = first.output[2]
        assert (call.name, call.arguments) == ("look", '{"at": "é"}')
        assert first.output[0].content[0].text == "where"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "a lamp"}
        items += [*back(first.output), result]
        second = await answered(client, stream, input=items, tools=[TOOL])
        assert second.output_text == "It is there."
        items += [*back(second.output), {"role": "user", "content": "thanks"}]
        third = await answered(client, stream, input=items, tools=[TOOL])
        assert third.output_text == "bye"
        assert said_of(house, session) == SAID
        assert "a lamp" in house.text(house.prompts[1])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_loop_that_goes_on_from_the_last_response_is_one_sample(enter, stream):
    async with enter() as house:
        session, client = house.open()
        house.says = [CALL + END, f"<think>so</think>It is there.{END}", f"bye{END}"]
        first = await answered(client, stream, input="find it", tools=[TOOL])
        result = {
            "type": "function_call_output", "call_id": first.output[-1].call_id,
            "output": [{"type": "input_text", "text": "a lamp"}],
        }  # fmt: skip
        asked = {"input": [result], "tools": [TOOL], "previous_response_id": first.id}
        second = await answered(client, stream, **asked)
        await answered(client, stream, input="thanks", tools=[TOOL], previous_response_id=second.id)
        assert said_of(house, session) == SAID
        again = await client.responses.retrieve(second.id)
        assert again.output_text == "It is there."
        reference = {"type": "item_reference", "id": second.output[-1].id}
        await answered(
            client, stream,
            input=[{"role": "user", "content": "?"}, reference, {"role": "user", "content": "!"}],
        )  # fmt: skip
        assert "It is there." in house.text(house.prompts[-1])
        await client.responses.delete(second.id)
        with pytest.raises(openai.BadRequestError, match=f'previous_response_id="{second.id}"'):
            await answered(client, stream, **{**asked, "previous_response_id": second.id})


async def test_what_is_not_stored_or_another_episodes_is_not_gone_on_from(enter):
    async with enter() as house:
        _, client = house.open()
        _, other = house.open()
        for answer in (
            await client.responses.create(model="policy", input="hi", store=False),
            await other.responses.create(model="policy", input="hi"),
        ):
            with pytest.raises(openai.BadRequestError, match="send the items again"):
                await client.responses.create(
                    model="policy", input="?", previous_response_id=answer.id
                )
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(answer.id)


async def test_a_stream_has_its_events_in_order(enter):
    async with enter() as house:
        _, client = house.open()
        house.says = [CALL + END]
        stream = await client.responses.create(
            model="policy", input="find it", tools=[TOOL], stream=True
        )
        events = [event async for event in stream]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        kinds = [event.type.removeprefix("response.") for event in events]
        once = [
            kind for n, kind in enumerate(kinds) if kind not in kinds[:n] or "delta" not in kind
        ]
        part = ["output_item.added", "content_part.added"]
        end = ["content_part.done", "output_item.done"]
        assert once == [
            "created", "in_progress",
            *part, "reasoning_text.delta", "reasoning_text.done", *end,
            *part, "output_text.delta", "output_text.done", *end,
            "output_item.added", "function_call_arguments.delta", "function_call_arguments.done",
            "output_item.done", "completed",
        ]  # fmt: skip
        deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
        assert deltas == events[-1].response.output_text == "I look."


@pytest.mark.parametrize("stream", [False, True])
async def test_the_length_ends_a_response_and_says_so(enter, stream):
    async with enter() as house:
        session, client = house.open()
        house.says = [house.tokens("too long")[:3]]
        answer = await client.responses.create(
            model="policy", input="hi", max_output_tokens=3, stream=stream
        )
        if stream:
            last = [event async for event in answer][-1]
            assert last.type == "response.incomplete"
            answer = last.response
        assert answer.status == "incomplete"
        assert answer.incomplete_details.reason == "max_output_tokens"
        assert said_of(house, session) == answer.output_text


class Found(BaseModel):
    at: str


async def test_a_schema_that_nothing_keeps_to_is_refused_by_name(enter):
    async with enter() as house:
        _, client = house.open()
        with pytest.raises(openai.BadRequestError, match="text=.*not constrained"):
            await client.responses.parse(model="policy", input="hi", text_format=Found)


def ask(ignore=(), kept=None, **changes):
    body = {"model": "policy", "input": "hi", **changes}
    return Request(body, model="policy", ignore=Ignore(ignore), kept={} if kept is None else kept)


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("top_p", {"top_p": 0.9}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": "required"}),
        ("tools[0].strict", {"tools": [{**TOOL, "strict": True}]}),
        ("tools[0].type", {"tools": [{"type": "web_search"}]}),
        ("reasoning", {"reasoning": {"effort": "low"}}),
        ("include", {"include": ["message.output_text.logprobs"]}),
        ("background", {"background": True}),
        ("truncation", {"truncation": "auto"}),
        ("conversation", {"conversation": "c"}),
        ("previous_response_id", {"previous_response_id": "resp_0"}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("input", {"input": []}),
        ("input", {"input": 5}),
        ("input[0].type", {"input": [{"type": "computer_call"}]}),
        ("input[0].id", {"input": [{"type": "item_reference", "id": "msg_0"}]}),
        ("input[0].role", {"input": [{"role": "tool", "content": "x"}]}),
        ("input[1].call_id", {"input": [{"role": "user", "content": "x"},
                                        {"type": "function_call_output", "output": "y"}]}),
        ("unheard_of", {"unheard_of": 1}),
    ],
)  # fmt: skip
def test_what_can_not_be_honoured_is_refused_by_name(field, changes):
    with pytest.raises(ApiError) as told:
        ask(**changes)
    assert told.value.status == 400
    assert told.value.param == field


@pytest.mark.parametrize(
    ("ignore", "changes"),
    [
        ("*", {"top_p": 0.5, "reasoning": {"effort": "low"}, "truncation": "auto", "x": 1,
               "text": {"verbosity": "low"}}),
        ("strict", {"tools": [{**TOOL, "strict": True}]}),
        ("web_search", {"tools": [TOOL, {"type": "web_search"}]}),
        ("other", {"input": [{"type": "other"}, {"role": "user", "content": "hi"}]}),
        ("input_image", {"input": [{"role": "user", "content": [
            {"type": "input_image", "image_url": "u"}, {"type": "input_text", "text": "hi"}]}]}),
    ],
)  # fmt: skip
def test_it_may_be_overlooked(ignore, changes):
    assert ask(ignore=[ignore], **changes).ask.messages == [{"role": "user", "content": "hi"}]


def test_items_become_messages_and_what_is_said_between_two_others_is_one():
    def thought(text):
        content = [{"type": "reasoning_text", "text": text}]
        return {"type": "reasoning", "summary": [], "content": content}

    def call(arguments):
        return {"type": "function_call", "call_id": "c", "name": "look", "arguments": arguments}

    asked = ask(
        instructions="i", temperature=0.5, tools=[TOOL], tool_choice="none",
        input=[
            {"role": "developer", "content": "d"},
            {"role": "user", "content": [{"type": "input_text", "text": "u"},
                                         {"type": "input_text", "text": "v"}]},
            thought("a"), thought("b"), {"role": "assistant", "content": "c"},
            {"type": "message", "role": "assistant",
             "content": [{"type": "output_text", "text": "d"}]},
            call('{"at": 1}'), call("{not"),
            {"type": "function_call_output", "call_id": "c", "output": "o"},
            {"role": "assistant", "content": "e"},
            {"role": "user", "content": "w"},
            {"role": "assistant", "content": "f"},
        ],
    ).ask  # fmt: skip
    calls = [
        {"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}
        for arguments in ({"at": 1}, "{not")
    ]
    assert asked.messages == [
        {"role": "system", "content": "i"},
        {"role": "system", "content": "d"},
        {"role": "user", "content": "uv"},
        {"role": "assistant", "content": "cd", "reasoning_content": "ab", "tool_calls": calls},
        {"role": "tool", "content": "o", "tool_call_id": "c"},
        {"role": "assistant", "content": "e"},
        {"role": "user", "content": "w"},
        {"role": "assistant", "content": "f"},
    ]
    assert asked.temperature == 0.5
    assert not asked.parse_tools


async def test_an_answer_tells_what_was_asked_and_how_far_it_came(enter):
    async with enter() as house:
        _, client = house.open()
        house.says = [house.tokens("too long")[:3], END]
        cut = await client.responses.create(
            model="policy", input="hi", max_output_tokens=3, store=False, temperature=1.0
        )
        assert (cut.store, cut.temperature, cut.max_output_tokens) == (False, 1.0, 3)
        assert [item.status for item in cut.output] == ["incomplete"]
        assert cut.usage.total_tokens == cut.usage.input_tokens + 3
        silent = await client.responses.create(model="policy", input="hi")
        assert [item.type for item in silent.output] == ["message"]
        assert (silent.store, silent.output_text) == (True, "")


async def test_a_streams_items_begin_empty_and_end_whole(enter):
    async with enter() as house:
        _, client = house.open()
        house.says = [CALL + END]
        stream = await client.responses.create(
            model="policy", input="find it", tools=[TOOL], stream=True
        )
        events = [event async for event in stream]
    begun = [event.item for event in events if event.type == "response.output_item.added"]
    assert [item.status for item in begun] == ["in_progress"] * 3
    assert [item.content for item in begun[:2]] == [[], []]
    assert begun[2].arguments == ""
    whole = events[-1].response.output
    assert [e.item for e in events if e.type == "response.output_item.done"] == whole
    (thought,) = [e.text for e in events if e.type == "response.reasoning_text.done"]
    (text,) = [e.text for e in events if e.type == "response.output_text.done"]
    assert (thought, text) == ("where", "I look.")
