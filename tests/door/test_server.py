"""The door, through the official client: answers, streams, errors."""

import json

import openai
import pytest

USER = {"role": "user", "content": "hi"}
MOVE = {
    "type": "function",
    "function": {
        "name": "move",
        "description": "Go somewhere.",
        "parameters": {"type": "object", "properties": {"to": {"type": "string"}}},
    },
}
CALL = '<tool_call>\n{"name": "move", "arguments": {"to": "Zürich"}}\n</tool_call>'


def chat(client, *messages, **options):
    options = {"model": "policy", "messages": [*messages] or [USER], **options}
    return client.chat.completions.create(**options)


async def refusal(call) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as told:
        await call
    return told.value


# ── answers ──────────────────────────────────────────────────────────────────────────────────


async def test_a_chat_is_answered_and_recorded(enter):
    async with enter() as house:
        session, client = house.open()
        async with client:
            house.says = ["hello<|im_end|>"]
            answer = await chat(client)
        (choice,) = answer.choices
        assert (choice.message.content, choice.finish_reason) == ("hello", "stop")
        (sequence,) = session.sequences()
        prompt = house.tokens("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
        said = house.tokens("hello<|im_end|>")
        assert sequence.token_ids.tolist() == prompt + said
        assert sequence.loss_mask.tolist() == [0] * len(prompt) + [1] * len(said)
        assert sequence.versions.tolist() == [-1] * len(prompt) + [0] * len(said)
        assert all(sequence.logprobs[len(prompt) :] < 0)
        assert not sequence.logprobs[: len(prompt)].any()
        assert answer.usage.prompt_tokens == len(prompt)
        assert answer.usage.completion_tokens == len(said)


async def test_both_ways_to_show_the_token_reach_the_same_episode(enter):
    async with enter() as house:
        session, client = house.open()
        bearer = openai.AsyncOpenAI(base_url=f"{house.door.url}/v1", api_key=session.api_key)
        path = openai.AsyncOpenAI(base_url=session.base_url, api_key="whatever")
        async with client, bearer, path:
            await chat(bearer)
            await chat(path)
        assert len(session.sequences()) == 2


async def test_a_text_is_completed_from_a_string_or_from_token_ids(enter):
    async with enter() as house:
        session, client = house.open()
        async with client:
            house.says = [" there<|im_end|>", "!<|im_end|>"]
            first = await client.completions.create(model="policy", prompt="hello")
            prompt = house.tokens("bye")
            second = await client.completions.create(model="policy", prompt=prompt)
        assert (first.choices[0].text, second.choices[0].text) == (" there", "!")
        assert house.prompts == [house.tokens("hello"), prompt]
        assert [house.text(s.token_ids) for s in session.sequences()] == [
            "hello there<|im_end|>",
            "bye!<|im_end|>",
        ]


async def test_the_model_is_listed(enter):
    async with enter() as house:
        _, client = house.open()
        async with client:
            assert [model.id async for model in client.models.list()] == ["policy"]


async def test_a_tool_is_called_and_its_result_is_read(enter):
    async with enter() as house:
        session, client = house.open()
        async with client:
            house.says = [f"<think>far</think>Well.{CALL}<|im_end|>", "Done.<|im_end|>"]
            first = (await chat(client, tools=[MOVE])).choices[0]
            (call,) = first.message.tool_calls
            assert first.finish_reason == "tool_calls"
            assert (call.type, call.function.name) == ("function", "move")
            assert json.loads(call.function.arguments) == {"to": "Zürich"}
            assert first.message.content == "Well."
            assert first.message.reasoning_content == "far"
            result = {"role": "tool", "tool_call_id": call.id, "content": "you are there"}
            last = await chat(client, USER, first.message, result, tools=[MOVE])
        assert last.choices[0].message.content == "Done."
        (sequence,) = session.sequences()
        assert house.text(sequence.token_ids).endswith(
            f"<think>far</think>Well.{CALL}<|im_end|>\n<|im_start|>tool\nyou are there<|im_end|>\n"
            "<|im_start|>assistant\nDone.<|im_end|>"
        )


async def test_a_call_may_be_ended_by_another_special_token_than_a_turn(enter):
    """The engine knows it; the next prompt goes on from it."""
    async with enter() as house:
        session, client = house.open()
        house.tokenizer.chat_template = house.tokenizer.chat_template.replace(
            "</tool_call>{% endfor %}<|im_end|>\n",
            "</tool_call>{% endfor %}{{ '<|call|>' if m.tool_calls else '<|im_end|>' }}\n",
        )
        async with client:
            spaced = CALL.replace(" ", "")  # not as the template would write it
            house.says = [f"{spaced}<|call|>"]
            message = (await chat(client, tools=[MOVE])).choices[0].message
            assert message.content is None
            result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "ok"}
            await chat(client, USER, message, result, tools=[MOVE])
        (sequence,) = session.sequences()
        assert f"{spaced}<|call|>\n<|im_start|>tool" in house.text(sequence.token_ids)


async def test_with_tool_choice_none_what_looks_like_a_call_is_text(enter):
    async with enter() as house:
        _, client = house.open()
        async with client:
            house.says = [f"{CALL}<|im_end|>"]
            choice = (await chat(client, tools=[MOVE], tool_choice="none")).choices[0]
        assert (choice.message.content, choice.finish_reason) == (CALL, "stop")
        assert choice.message.tool_calls is None


@pytest.mark.parametrize("broken", ['{"name": "move", "arg', '{"nom": "move"}', "[]", "7"])
async def test_a_call_that_is_not_one_is_given_as_the_text_that_it_is(enter, broken):
    text = f"I will.\n<tool_call>{broken}</tool_call>"
    async with enter() as house:
        _, client = house.open()
        async with client:
            house.says = [f"{text}<|im_end|>"] * 2
            choice = (await chat(client, tools=[MOVE])).choices[0]
            stream = await chat(client, tools=[MOVE], stream=True)
            streamed = [chunk.choices[0] async for chunk in stream]
        assert (choice.message.content, choice.finish_reason) == (text, "stop")
        assert "".join(piece.delta.content or "" for piece in streamed) == text


async def test_several_responses_to_a_prompt_are_sequences_of_their_own(enter):
    async with enter() as house:
        session, client = house.open()
        async with client:
            house.says = ["a<|im_end|>", "b<|im_end|>", "c<|im_end|>"]
            answer = await chat(client, n=3)
        assert [choice.message.content for choice in answer.choices] == ["a", "b", "c"]
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        assert [house.text(s.token_ids)[-11:] for s in session.sequences()] == [
            f"{letter}<|im_end|>" for letter in "abc"
        ]
        assert answer.usage.completion_tokens == 6


async def test_the_length_ends_a_response_and_says_so(enter):
    async with enter() as house:
        session, client = house.open(max_tokens=6)
        async with client:
            house.says = ["hello world"] * 3
            asked = await chat(client, max_completion_tokens=3)
            assert (asked.choices[0].message.content, asked.choices[0].finish_reason) == (
                "hel",
                "length",
            )
            capped = await chat(client, max_tokens=100)
            assert capped.choices[0].message.content == "hello "
        assert [int(sequence.loss_mask.sum()) for sequence in session.sequences()] == [3, 6]


async def test_a_stop_string_ends_the_text_and_the_tokens_after_it_do_not_count(enter):
    async with enter() as house:
        session, client = house.open()
        async with client:
            said = "Action: go\nObservation: none"
            house.says = [said, "ok<|im_end|>"]
            stop = ["Observation:", "\n\n"]
            answer = await chat(client, stop=stop, max_tokens=len(house.tokens(said)))
            (choice,) = answer.choices
            assert (choice.message.content, choice.finish_reason) == ("Action: go\n", "stop")
            assert answer.usage.completion_tokens == len(house.tokens("Action: go\nObservation:"))
            await chat(client, USER, choice.message, USER)
        assert [sampling.stop for sampling in house.samplings] == [tuple(stop), ()]
        (sequence,) = session.sequences()
        assert house.text(sequence.token_ids).endswith(
            "assistant\nAction: go\nObservation:<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
            "<|im_start|>assistant\nok<|im_end|>"
        )


async def test_logprobs_are_the_engines_one_for_each_sampled_token(enter):
    async with enter() as house:
        session, client = house.open()
        async with client:
            house.says = ["né<|im_end|>", "abc<|im_end|>"]
            chatted = (await chat(client, logprobs=True)).choices[0].logprobs.content
            texted = await client.completions.create(model="policy", prompt="x", logprobs=0)
        first, second = session.sequences()
        sampled = first.loss_mask > 0
        assert [entry.logprob for entry in chatted] == pytest.approx(first.logprobs[sampled])
        assert [entry.token for entry in chatted] == ["n", "�", "�", "<|im_end|>"]
        assert [entry.bytes for entry in chatted][:2] == [[ord("n")], None]
        told = texted.choices[0].logprobs
        assert told.tokens == ["a", "b", "c", "<|im_end|>"]
        assert told.token_logprobs == pytest.approx(second.logprobs[second.loss_mask > 0])


# ── streams ──────────────────────────────────────────────────────────────────────────────────


async def test_a_stream_says_what_the_whole_answer_says(enter):
    said = f"<think>hmm\nhmm</think>\n\nWëll, let me see where to go.\n{CALL}\n{CALL}<|im_end|>"
    async with enter() as house:
        session, client = house.open()
        async with client:
            house.says = [said] * 2
            options = {"tools": [MOVE], "logprobs": True}
            whole = await chat(client, **options)
            usage = {"include_usage": True}
            stream = await chat(client, stream=True, stream_options=usage, **options)
            chunks = [chunk async for chunk in stream]
        message = whole.choices[0].message
        assert [call.function.name for call in message.tool_calls] == ["move", "move"]
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
        deltas = [choice.delta for choice in choices]
        assert deltas[0].role == "assistant"
        assert sum(bool(delta.content) for delta in deltas) > 1, "it came in pieces"
        assert "".join(delta.content or "" for delta in deltas) == message.content
        reasoning = "".join(getattr(delta, "reasoning_content", "") for delta in deltas)
        assert reasoning == message.reasoning_content
        calls = [call for delta in deltas for call in delta.tool_calls or []]
        assert [call.index for call in calls] == [0, 1]
        assert [call.function.model_dump() for call in calls] == [
            call.function.model_dump() for call in message.tool_calls
        ]
        finish = [choice.finish_reason for choice in choices]
        assert finish == [None] * (len(finish) - 1) + ["tool_calls"]
        entries = [e for choice in choices if choice.logprobs for e in choice.logprobs.content]
        assert len(entries) == len(house.tokens(said))
        assert chunks[-1].usage == whole.usage
        assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert len({chunk.id for chunk in chunks}) == 1
        assert len(session.sequences()) == 2


async def test_a_text_streams_too(enter):
    async with enter() as house:
        _, client = house.open()
        async with client:
            house.says = ["one two three four five six seven<|im_end|>"]
            stream = await client.completions.create(
                model="policy", prompt="zero ", stream=True, n=1
            )
            choices = [chunk.choices[0] async for chunk in stream]
        assert "".join(c.text for c in choices) == "one two three four five six seven"
        assert len(choices) > 2
        assert choices[-1].finish_reason == "stop"


async def test_a_streamed_message_that_comes_back_is_known(enter):
    """As a client puts it together from deltas, with fields of its own."""
    async with enter() as house:
        session, client = house.open()
        async with client:
            house.says = [f"<think>x</think> Go. {CALL}<|im_end|>", "ok<|im_end|>"]
            async with client.chat.completions.stream(
                model="policy", messages=[USER], tools=[MOVE]
            ) as stream:
                message = (await stream.get_final_completion()).choices[0].message
            call_id = message.tool_calls[0].id
            result = {"role": "tool", "tool_call_id": call_id, "content": "there"}
            await chat(client, USER, message, result, tools=[MOVE])
        assert len(session.sequences()) == 1
