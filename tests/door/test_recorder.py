"""Calls join into sequences by their tokens, and nothing that was sampled is tokenised again."""

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash.conversation import ChatTemplate, spoken_turns
from flash.door.recorder import Memory, Recorder
from flash.types import Completion

USER = {"role": "user", "content": "hi"}


def completion(*token_ids: int, version: int = 0, temperature: float = 1.0) -> Completion:
    return Completion(
        token_ids=list(token_ids),
        logprobs=[-float(token) for token in token_ids],
        versions=[version] * len(token_ids),
        temperature=temperature,
        finish_reason="stop",
    )


def parts(recorder: Recorder) -> list[tuple[list[int], list[int]]]:
    """Of each sequence its tokens and its mask."""
    return [(s.token_ids.tolist(), s.loss_mask.tolist()) for s in recorder.sequences()]


# ── the recorder ─────────────────────────────────────────────────────────────────────────────


def test_a_call_that_goes_on_extends_the_sequence():
    recorder = Recorder()
    recorder.add([1, 2], completion(3, 4, version=5, temperature=0.5))
    recorder.add([1, 2, 3, 4, 9], completion(6, version=7, temperature=2.0))
    (sequence,) = recorder.sequences()
    assert sequence.token_ids.tolist() == [1, 2, 3, 4, 9, 6]
    assert sequence.loss_mask.tolist() == [0, 0, 1, 1, 0, 1]
    assert sequence.logprobs.tolist() == [0, 0, -3, -4, 0, -6]
    assert sequence.versions.tolist() == [-1, -1, 5, 5, -1, 7]
    assert sequence.temperatures.tolist() == [1, 1, 0.5, 0.5, 1, 2]


def test_what_was_sampled_under_a_constraint_is_known_and_not_trained_on():
    recorder = Recorder()
    recorder.add([1, 2], completion(3, 4, version=5), trained=False)
    recorder.add([1, 2, 3, 4, 9], completion(6, version=7))
    (sequence,) = recorder.sequences()
    assert sequence.loss_mask.tolist() == [0, 0, 0, 0, 0, 1]
    assert sequence.turns.tolist() == [-1, -1, 0, 0, -1, 1]
    assert sequence.versions.tolist() == [-1, -1, 5, 5, -1, 7]
    assert sequence.sampled_versions().tolist() == [7]
    assert sequence.runs() == [(False, [1, 2]), (True, [3, 4]), (False, [9]), (True, [6])]
    assert [turn.said for turn in spoken_turns([sequence])] == [[3, 4], [6]]


def test_a_prompt_that_lacks_the_last_sampled_token_opens_a_new_sequence():
    recorder = Recorder()
    recorder.add([1, 2], completion(3, 4))
    recorder.add([1, 2, 3, 9], completion(6))
    assert parts(recorder) == [([1, 2, 3, 4], [0, 0, 1, 1]), ([1, 2, 3, 9, 6], [0, 0, 0, 0, 1])]


def test_of_two_calls_that_go_on_from_the_same_one_the_second_has_it_as_its_prompt():
    recorder = Recorder()
    recorder.add([1], completion(2))
    recorder.add([1, 2, 8], completion(3))
    recorder.add([1, 2, 9], completion(4))
    assert parts(recorder) == [([1, 2, 8, 3], [0, 1, 0, 1]), ([1, 2, 9, 4], [0, 0, 0, 1])]


def test_the_longest_sequence_that_fits_is_extended():
    recorder = Recorder()
    recorder.add([1], completion(2, 7))
    recorder.add([1, 2, 3], completion(4))
    recorder.add([1], completion(2))
    recorder.add([1, 2, 3, 4], completion(5))
    assert parts(recorder) == [
        ([1, 2, 7], [0, 1, 1]),
        ([1, 2, 3, 4, 5], [0, 0, 0, 1, 1]),
        ([1, 2], [0, 1]),
    ]


def test_turns_are_counted_over_all_sequences_of_an_episode():
    recorder = Recorder()
    recorder.add([1], completion(2))
    recorder.add([8], completion(9))
    recorder.add([1, 2], completion(3, 4))
    assert [s.turns.tolist() for s in recorder.sequences()] == [[-1, 0, 2, 2], [-1, 1]]


@given(
    st.lists(
        st.tuples(st.integers(-1, 5), st.integers(0, 3), st.integers(0, 2), st.integers(1, 3)),
        max_size=12,
    )
)
def test_each_sampled_token_is_trained_exactly_once_after_the_tokens_it_was_sampled_after(calls):
    """Calls go on from any earlier one, whole or cut short, with something new in between."""
    recorder, done, sampled = Recorder(), [], []
    for number, (parent, cut, new, length) in enumerate(calls):
        before = done[parent] if 0 <= parent < len(done) else []
        prompt = [*before[: len(before) - cut], *[900 + number] * new] or [0]
        tokens = [1000 + 10 * number + i for i in range(length)]
        known = recorder.add(prompt, completion(*tokens))
        done.append(prompt + tokens)
        assert known.token_ids() == done[-1]
        sampled += [(done[-1][: len(prompt) + i], token) for i, token in enumerate(tokens)]
    trained = [
        (ids[:at], ids[at]) for ids, mask in parts(recorder) for at in range(len(ids)) if mask[at]
    ]
    assert sorted(trained) == sorted(sampled)


# ── the memory ───────────────────────────────────────────────────────────────────────────────


async def chat(client, *messages, **options) -> str:
    """What is answered."""
    answer = await client.chat.completions.create(
        model="policy", messages=list(messages), **options
    )
    return answer.choices[0].message.content


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


async def test_a_conversation_that_only_grew_is_one_sequence_of_what_was_really_sampled(enter):
    """The template would trim the words, drop the reasoning and end the turn itself."""
    async with enter() as house:
        session, client = house.open()
        async with client:
            first = "<think>hm</think>\n\n go  \n<|im_end|>"
            # No end of turn, and "go" from tokens that the tokenizer would not take for it.
            second = house.tokens("g") + house.tokens("o") + house.tokens(" é")
            assert second != house.tokens("go é")
            house.says = [first, second, "bye<|im_end|>"]
            one = await chat(client, USER)
            assert one == "go  \n"
            two = await chat(client, USER, said(one.strip()), USER, max_tokens=len(second))
            three = await chat(client, USER, said(one), USER, said(two), USER)
        (sequence,) = session.sequences()
        turn = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        text = f"{turn}{first}\n{turn}go é<|im_end|>\n{turn}{three}<|im_end|>"
        assert house.text(sequence.token_ids) == text
        sampled = sequence.token_ids[sequence.loss_mask > 0].tolist()
        assert sampled == house.tokens(first) + second + house.tokens("bye<|im_end|>")


@pytest.mark.parametrize(
    "history",
    [
        [USER, said("changed"), USER],
        [{"role": "user", "content": "hi!"}, said("go"), USER],
        [{"role": "system", "content": "new"}, USER, said("go"), USER],
        [said("go"), USER],
    ],
    ids=["the answer", "the question", "a system message", "the beginning left out"],
)
async def test_a_rewritten_history_opens_a_new_sequence(enter, history):
    async with enter() as house:
        session, client = house.open()
        async with client:
            house.says = ["go<|im_end|>", "on<|im_end|>"]
            await chat(client, USER)
            await chat(client, *history)
        _, second = session.sequences()
        assert house.text(second.token_ids[second.loss_mask > 0]) == "on<|im_end|>"
        rendered = ChatTemplate(house.tokenizer).render(history)
        assert house.text(second.token_ids) == f"{rendered}on<|im_end|>"


async def test_other_tools_open_a_new_sequence(enter):
    tool = {"type": "function", "function": {"name": "move"}}
    async with enter() as house:
        session, client = house.open()
        async with client:
            answer = await chat(client, USER)
            await chat(client, USER, said(answer), USER, tools=[tool])
            await chat(client, USER, said(answer), USER)
        without, with_tool = session.sequences()
        assert [without.loss_mask.sum(), with_tool.loss_mask.sum()] == [6, 3]
        assert '"move"' in house.text(with_tool.token_ids)


async def test_a_history_rewritten_late_goes_on_from_what_is_left_of_it(enter):
    """The first answer stays as it was sampled, though the second was edited."""
    async with enter() as house:
        session, client = house.open()
        async with client:
            house.says = ["  one<|im_end|>", "two<|im_end|>", "three<|im_end|>"]
            one = await chat(client, USER)
            await chat(client, USER, said(one), USER)
            await chat(client, USER, said(one), USER, said("zwei"), USER)
        _, edited = session.sequences()
        turn = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
        assert house.text(edited.token_ids) == (
            f"{turn}  one<|im_end|>\n{turn}zwei<|im_end|>\n{turn}three<|im_end|>"
        )


async def test_two_branches_of_a_conversation_are_two_sequences(enter):
    async with enter() as house:
        session, client = house.open()
        async with client:
            house.says = ["root<|im_end|>", "left<|im_end|>", "right<|im_end|>", "more<|im_end|>"]
            root = await chat(client, USER)
            left, right = ({"role": "user", "content": side} for side in ("left", "right"))
            await chat(client, USER, said(root), left)
            await chat(client, USER, said(root), right)
            await chat(client, USER, said(root), right, said("right"), USER)
        sampled = [house.text(s.token_ids[s.loss_mask > 0]) for s in session.sequences()]
        assert sampled == ["root<|im_end|>left<|im_end|>", "right<|im_end|>more<|im_end|>"]


async def test_a_text_that_goes_on_from_its_completion_is_one_sequence(enter):
    async with enter() as house:
        session, client = house.open()

        async def complete(prompt: str) -> str:
            answer = await client.completions.create(model="policy", prompt=prompt)
            return answer.choices[0].text

        async with client:
            house.says = [" b<|im_end|>", " d<|im_end|>", " x<|im_end|>"]
            text = "a"
            text += await complete(text) + " c"
            await complete(text)
            await complete("a b")
        first, second = session.sequences()
        assert house.text(first.token_ids) == "a b<|im_end|> c d<|im_end|>"
        assert house.text(second.token_ids) == "a b<|im_end|> x<|im_end|>"
        assert house.text(second.token_ids[second.loss_mask > 0]) == " x<|im_end|>"


async def test_messages_that_the_template_refuses_are_the_clients_fault(enter):
    async with enter() as house:
        house.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        _, client = house.open()
        async with client:
            with pytest.raises(openai.BadRequestError, match="roles must alternate"):
                await chat(client, USER)


def test_a_call_that_was_cut_off_by_its_length_is_rendered_anew(tokenizer):
    """Where the template does not show where the turn ends, nothing is guessed."""
    template, memory = ChatTemplate(tokenizer), Memory()
    function = {"name": "f", "arguments": {}}
    call = {"id": "1", "type": "function", "function": function}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    sampled = tokenizer.encode('<tool_call>{"name": "f", "arguments": {}}</tool_call>')
    known = Recorder().add([1], completion(*sampled))
    memory.note_chat([USER], turn, [], known)
    messages = [USER, turn, USER]
    assert memory.chat_prompt(template, messages, {}) == template.prompt(messages)
