"""Anthropic's messages, with the official client, which knows nothing of us."""

import anthropic
import httpx
import pytest

from flash.door.anthropic import error_body, parse_messages
from flash.door.errors import ApiError
from flash.door.schema import Ignore

TOOL = {
    "name": "look", "description": "looks",
    "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}},
}  # fmt: skip
CALL = (
    '<think>where</think>I look.<tool_call>{"name": "look", "arguments": {"at": "é"}}</tool_call>'
)
END = "<|im_end|>"


def client(session) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(
        base_url=session.anthropic_base_url, api_key=session.api_key, max_retries=0
    )


def user(content):
    return {"role": "user", "content": content}


async def test_a_message_is_answered_and_recorded(enter):
    async with enter() as house:
        session, _ = house.open()
        house.says = [f"hello{END}"]
        async with client(session) as claude:
            said = await claude.messages.create(
                model="policy", max_tokens=50, system="be brief", messages=[user("hi")]
            )
        assert (said.type, said.role, said.model) == ("message", "assistant", "policy")
        assert [block.text for block in said.content] == ["hello"]
        assert (said.stop_reason, said.stop_sequence) == ("end_turn", None)
        (sequence,) = session.sequences()
        assert said.usage.output_tokens == sequence.loss_mask.sum() == len("hello") + 1
        assert said.usage.input_tokens == len(house.prompts[0])
        assert house.text(house.prompts[0]) == (
            "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\n"
        )


async def answered(claude, stream, **asked):
    if not stream:
        return await claude.messages.create(model="policy", max_tokens=400, **asked)
    async with claude.messages.stream(model="policy", max_tokens=400, **asked) as streamed:
        return await streamed.get_final_message()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("dumped", [False, True])
async def test_a_loop_of_thoughts_and_tools_is_one_sample(enter, stream, dumped):
    def as_sent(content):
        return [block.model_dump() for block in content] if dumped else content

    async with enter() as house:
        session, _ = house.open()
        house.says = [CALL + END, f"<think>so</think>It is there.{END}", f"bye{END}"]
        messages = [user("find it")]
        async with client(session) as claude:
            first = await answered(claude, stream, messages=messages, tools=[TOOL])
            assert first.stop_reason == "tool_use"
            kinds = [block.type for block in first.content]
            assert kinds == ["thinking", "text", "tool_use"]
            thought, text, call = first.content
            assert (thought.thinking, text.text) == ("where", "I look.")
            assert (call.name, call.input) == ("look", {"at": "é"})
            messages += [
                {"role": "assistant", "content": as_sent(first.content)},
                user([
                    {"type": "tool_result", "tool_use_id": call.id,
                     "content": [{"type": "text", "text": "a lamp"}]},
                    {"type": "text", "text": "well?", "cache_control": {"type": "ephemeral"}},
                ]),
            ]  # fmt: skip
            second = await answered(claude, stream, messages=messages, tools=[TOOL])
            assert [block.type for block in second.content] == ["thinking", "text"]
            messages += [{"role": "assistant", "content": as_sent(second.content)}, user("thanks")]
            third = await answered(claude, stream, messages=messages, tools=[TOOL])
            assert [block.text for block in third.content] == ["bye"]
        (sequence,) = session.sequences()
        said = "".join(house.text(ids) for sampled, ids in sequence.runs() if sampled)
        assert said == f"{CALL}{END}<think>so</think>It is there.{END}bye{END}"
        assert "a lamp" in house.text(house.prompts[1])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("arguments", ["[1]", '"at"', "null"])
async def test_arguments_that_are_no_object_keep_it_one_sample(enter, stream, arguments):
    written = f'<tool_call>{{"name": "look", "arguments": {arguments}}}</tool_call>{END}'
    async with enter() as house:
        session, _ = house.open()
        house.says = [written, f"done{END}"]
        messages = [user("find it")]
        async with client(session) as claude:
            said = await answered(claude, stream, messages=messages, tools=[TOOL])
            (call,) = said.content
            assert list(call.input) == ["arguments"]
            result = {"type": "tool_result", "tool_use_id": call.id, "content": "no such place"}
            messages += [{"role": "assistant", "content": said.content}, user([result])]
            await answered(claude, stream, messages=messages, tools=[TOOL])
        (sequence,) = session.sequences()
        sampled = "".join(house.text(ids) for sampled, ids in sequence.runs() if sampled)
        assert sampled == f"{written}done{END}"


@pytest.mark.parametrize("stream", [False, True])
async def test_thoughts_are_left_out_for_who_does_not_want_them_and_it_is_one_sample(enter, stream):
    async with enter() as house:
        session, _ = house.open()
        house.says = [f"<think>so</think>Yes.{END}"]
        asked = {"thinking": {"type": "adaptive", "display": "omitted"}}
        messages = [user("well?")]
        async with client(session) as claude:
            said = await answered(claude, stream, messages=messages, extra_body=asked)
            thought, text = said.content
            assert (thought.thinking, bool(thought.signature), text.text) == ("", True, "Yes.")
            messages += [{"role": "assistant", "content": said.content}, user("sure?")]
            await answered(claude, stream, messages=messages, extra_body=asked)
        (sequence,) = session.sequences()
        assert "<think>so</think>Yes." in house.text(sequence.token_ids)


@pytest.mark.parametrize(
    ("field", "value", "remedy"),
    [("tool_choice", "some", "send auto, any"), ("thinking", "enabled", "send disabled or")],
)
def test_a_choice_that_is_not_had_is_refused_with_those_that_are(field, value, remedy):
    body = {"model": "policy", "messages": [user("hi")], field: {"type": value}}
    with pytest.raises(ApiError, match=remedy):
        parse_messages(body, model="policy", ignore=Ignore([]))


async def test_tokens_are_counted_as_a_message_would_be_read_and_nothing_is_sampled(enter):
    async with enter() as house:
        session, _ = house.open()
        async with client(session) as claude:
            asked = {"model": "policy", "messages": [user("hi")], "tools": [TOOL]}
            count = await claude.messages.count_tokens(**asked)
            assert not house.prompts
            said = await claude.messages.create(max_tokens=5, **asked)
        assert count.input_tokens == said.usage.input_tokens == len(house.prompts[0])
        assert len(session.sequences()) == 1


async def test_what_ended_it_is_told(enter):
    async with enter() as house:
        session, _ = house.open()
        async with client(session) as claude:
            house.says = [f"one two three{END}"]
            said = await claude.messages.create(
                model="policy", max_tokens=50, stop_sequences=["three", " two"], messages=[user("")]
            )
            assert [block.text for block in said.content] == ["one"]
            assert (said.stop_reason, said.stop_sequence) == ("stop_sequence", " two")
            house.says = ["too long"]
            said = await answered(claude, True, messages=[user("a")])
            assert said.stop_reason in ("max_tokens", "end_turn")
            house.says = [END]
            said = await answered(claude, True, messages=[user("b")])
            assert (said.content, said.stop_reason) == ([], "end_turn")


async def test_errors_are_those_that_the_client_knows(enter):
    async with enter() as house:
        session, _ = house.open()
        stranger = anthropic.AsyncAnthropic(
            base_url=house.door.url, api_key="nobody's", max_retries=0
        )
        async with client(session) as claude, stranger:
            asked = {"model": "policy", "max_tokens": 5, "messages": [user("hi")]}
            with pytest.raises(anthropic.BadRequestError, match="top_p=0.5.*agent.ignore") as told:
                await claude.messages.create(**asked, extra_body={"top_p": 0.5})
            assert told.value.body["error"]["type"] == "invalid_request_error"
            with pytest.raises(anthropic.NotFoundError, match="the model here is 'policy'"):
                await claude.messages.create(**{**asked, "model": "claude"})
            with pytest.raises(anthropic.AuthenticationError, match="unknown"):
                await stranger.messages.create(**asked)
            session.close()
            with pytest.raises(anthropic.AuthenticationError, match="ended"):
                await claude.messages.create(**asked)


async def test_the_key_may_come_in_either_header(enter):
    async with enter() as house, httpx.AsyncClient() as http:
        session, _ = house.open()
        asked = {"model": "policy", "max_tokens": 5, "messages": [user("hi")]}
        for headers in (
            {"x-api-key": session.api_key}, {"Authorization": f"Bearer {session.api_key}"},
        ):  # fmt: skip
            url = f"{house.door.url}/v1/messages"
            assert (await http.post(url, json=asked, headers=headers)).status_code == 200
        assert (await http.post(url, json=asked)).status_code == 401


def parse(ignore=(), **changes):
    body = {"model": "policy", "max_tokens": 5, "messages": [user("hi")], **changes}
    return parse_messages(body, model="policy", ignore=Ignore(ignore))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("top_k", {"top_k": 5}),
        ("top_p", {"top_p": 0.9}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "some"}}),
        ("tool_choice", {"tool_choice": {"type": "any"}}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "tool", "name": "other"}}),
        ("thinking.display", {"thinking": {"type": "adaptive", "display": "full"}}),
        ("tools[0].defer_loading", {"tools": [{**TOOL, "defer_loading": True}]}),
        ("tools[0].allowed_callers[0]", {"tools": [{**TOOL, "allowed_callers": ["code"]}]}),
        ("thinking.type", {"thinking": {"type": "enabled", "budget_tokens": 2000}}),
        ("output_config.effort", {"output_config": {"effort": "low"}}),
        ("output_config.format.type", {"output_config": {"format": {"type": "x", "schema": {}}}}),
        ("container", {"container": "c"}),
        ("betas", {"betas": ["x"]}),
        ("max_tokens", {"max_tokens": 0}),
        ("system[0].type", {"system": [{"type": "image", "text": "x"}]}),
        ("tools[0].strict", {"tools": [{**TOOL, "strict": "yes"}]}),
        ("tools[0].type", {"tools": [{"type": "bash_20250124", "name": "bash"}]}),
        ("stop_sequences", {"stop_sequences": [""]}),
        ("messages", {"messages": []}),
        ("messages[0].content", {"messages": [user(5)]}),
        ("messages[1].role", {"messages": [user("a"), {"role": "tool", "content": "b"}]}),
        ("messages[1].role", {"messages": [user("a"), {"role": "assistant", "content": "b"}]}),
        (
            "messages[0].content[0]",
            {"messages": [user([{"type": "image", "source": {"type": "url", "url": "u"}}])]},
        ),
    ],
)  # fmt: skip
def test_what_can_not_be_honoured_is_refused_by_name(field, changes):
    with pytest.raises(ApiError) as told:
        parse(**changes)
    assert told.value.status == 400
    assert told.value.param == field
    assert ": " in str(told.value)


def test_a_client_that_would_send_what_is_new_alone_is_told_as_it_understands():
    with pytest.raises(ApiError, match="send all of its messages") as told:
        parse(ignore=["*"], thread={"type": "create"})
    assert error_body(told.value)["error"]["details"] == {
        "error_code": "thread_unsupported_request", "unsupported": ["thread"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("ignore", "changes"),
    [
        ("*", {"top_p": 0.5, "top_k": 3, "container": "c", "betas": ["x"], "service_tier": "auto",
               "output_config": {"effort": "low"}, "mcp_servers": [{}]}),
        ("thinking", {"thinking": {"type": "enabled", "budget_tokens": 2000}}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "any"}}),
        ("image", {"messages": [user([{"type": "image", "source": {}},
                                      {"type": "text", "text": "hi"}])]}),
        ("strict", {"tools": [{**TOOL, "strict": True}]}),
    ],
)  # fmt: skip
def test_it_may_be_overlooked(ignore, changes):
    asked = parse(ignore=[ignore], **changes)
    assert asked.messages == [{"role": "user", "content": "hi"}]


def test_what_changes_no_answer_is_taken():
    asked = parse(
        metadata={"user_id": "u"}, inference_geo="eu", user_profile_id="p", diagnostics={},
        thinking={"type": "disabled"}, top_k=0, temperature=0.5,
        tools=[{**TOOL, "type": "custom", "cache_control": {"type": "ephemeral"},
                "eager_input_streaming": True, "allowed_callers": ["direct"]}],
        tool_choice={"type": "none"},
        messages=[
            user("hi"),
            {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"},
                                              {"type": "text", "text": "ho"}]},
            user("hi"),
        ],
    )  # fmt: skip
    assert (asked.max_tokens, asked.temperature) == (5, 0.5)
    assert not asked.parse_tools
    assert asked.messages[1] == {"role": "assistant", "content": "ho"}
    assert asked.tools[0]["function"]["parameters"] == TOOL["input_schema"]
    assert asked.template_variables == {"enable_thinking": False}
