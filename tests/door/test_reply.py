"""What sampled tokens say does not depend on the pieces in which they come."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from flash.door.reply import Manners, Reply, load_template, manners_of

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
        },
    }
]
CALL = '<tool_call>{"name": "f", "arguments": {"x": "1"}}</tool_call>'
ALPHABET = st.sampled_from(
    [
        "a",
        "b",
        " ",
        "\n",
        "é",
        "🙂",
        "go",
        "<think>",
        "</think>",
        CALL,
        "<tool_call>",
        "<",
        "ST",
        "S",
    ]
)


def merged(deltas) -> dict[str, str]:
    """What a client puts together."""
    whole = {"content": "", "reasoning": "", "calls": []}
    for delta in deltas:
        whole["content"] += delta.get("content", "")
        whole["reasoning"] += delta.get("reasoning_content", "")
        whole["calls"] += delta.get("tool_calls", [])
    return whole


def say(tokenizer, pieces, **options):
    """The reply, and the deltas of all its pieces."""
    reply = Reply(tokenizer, stop_token_ids=[tokenizer.eos_token_id], **options)
    deltas = [delta for piece in pieces for delta in reply.feed(piece)]
    return reply, deltas + reply.finish()


def cut(tokens, sizes):
    pieces, at = [], 0
    for size in sizes:
        pieces.append(tokens[at : at + size])
        at += size
    return [*pieces, tokens[at:]]


@pytest.fixture
def encode(tokenizer):
    return lambda text: tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("parsed", [False, True])
def test_the_pieces_make_no_difference(tokenizer, encode, parsed):
    template = load_template(tokenizer.response_template, tools=True) if parsed else None
    options = {"response_template": template, "tools": TOOLS, "stop": ["STOP", "abab"]}

    @given(st.lists(ALPHABET, max_size=12).map("".join), st.lists(st.integers(0, 7), max_size=60))
    def check(text, sizes):
        tokens = [*encode(text), tokenizer.eos_token_id]
        whole, all_at_once = say(tokenizer, [tokens], **options)
        pieced, deltas = say(tokenizer, cut(tokens, sizes), **options)
        assert pieced.token_ids == whole.token_ids
        assert pieced.stopped == whole.stopped
        assert pieced.content == merged(deltas)["content"]
        assert whole.content == merged(all_at_once)["content"]
        if not parsed:
            expected = text
            for stop in ("STOP", "abab"):
                expected = expected.partition(stop)[0]
            assert pieced.content == whole.content == expected

    check()


def test_a_well_formed_response_is_the_same_token_by_token(tokenizer, encode):
    text = f"<think>why é\n</think>\n\nBecause 🙂.\n{CALL}\n{CALL}"
    tokens = [*encode(text), tokenizer.eos_token_id]
    options = {
        "response_template": load_template(tokenizer.response_template, tools=True),
        "tools": TOOLS,
    }
    for pieces in ([tokens], [[token] for token in tokens], [tokens[:40], tokens[40:]]):
        reply, deltas = say(tokenizer, pieces, **options)
        told = merged(deltas)
        assert (reply.reasoning, reply.content) == ("why é\n", "Because 🙂.")
        assert (told["reasoning"], told["content"]) == (reply.reasoning, reply.content)
        assert [call["index"] for call in told["calls"]] == [0, 1]
        arguments = [json.loads(call["function"]["arguments"]) for call in reply.tool_calls]
        assert arguments == [{"x": 1}, {"x": 1}], "as the tool's schema has it"


def test_a_character_whose_bytes_are_not_all_there_is_held_back(tokenizer, encode):
    reply = Reply(tokenizer)
    first, second, third, fourth = encode("🙂")
    assert reply.feed([*encode("a"), first]) == [{"content": "a"}]
    assert reply.feed([second]) == reply.feed([third]) == []
    assert reply.feed([fourth, *encode("b")]) == [{"content": "🙂b"}]
    assert reply.feed([first]) == []
    assert reply.finish() == [{"content": "�"}], "it never came whole, and is not lost"
    assert reply.content == "a🙂b�"


def test_words_that_come_one_by_one_keep_the_spaces_between_them():
    words = {word: n for n, word in enumerate(["go", "to", "drawer 3", "<stop>"])}
    core = Tokenizer(models.WordLevel(words, unk_token="<stop>"))
    reply = Reply(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<stop>"))
    assert [delta["content"] for n in range(4) for delta in reply.feed([n])] == [
        "go", " to", " drawer 3",
    ]  # fmt: skip
    assert reply.finish() == []


def test_what_may_become_a_stop_string_is_held_back_until_it_is_known(tokenizer, encode):
    reply = Reply(tokenizer, stop=["END"])
    assert reply.feed(encode("x E")) == [{"content": "x "}]
    assert reply.feed(encode("N")) == []
    assert reply.feed(encode("! EN")) == [{"content": "EN! "}]
    assert reply.feed(encode("D and more")) == []
    assert reply.stopped
    assert reply.feed(encode("more")) == reply.finish() == []
    assert reply.token_ids == encode("x EN! END")


def test_a_prompt_that_began_the_reasoning_is_known(tokenizer, encode):
    prompt = encode("<|im_start|>assistant\n<think>")
    reply, _ = say(
        tokenizer,
        [encode("hm</think>yes")],
        response_template=load_template(tokenizer.response_template, tools=True),
        prompt=prompt,
    )
    assert (reply.reasoning, reply.content) == ("hm", "yes")


@pytest.mark.slow  # imports torch
def test_how_a_model_writes_is_read_from_its_files(tokenizer, tmp_path):
    assert manners_of(tokenizer) == Manners(tokenizer.response_template, ())
    tokenizer.response_template = None
    assert manners_of(tokenizer) == Manners(None, ()), "a tokenizer made on the spot"
    of_model = SimpleNamespace(name_or_path=str(tmp_path))
    assert manners_of(of_model) == Manners(None, ()), "a tokenizer without a model"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    of_qwen = manners_of(of_model)
    assert "tool_calls" in of_qwen.response_template["fields"], "from transformers' own table"
    assert of_qwen.stop_token_ids == (5, 7)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert manners_of(of_model) == Manners(None, (5, 7))
