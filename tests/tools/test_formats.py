"""Calls in each format: read as they were said, answered as the chat template would have it."""

import json

import pytest

from flash.agents import ChatStyle
from flash.config import load
from flash.conversation import ChatTemplate
from flash.parts.model import make_style
from flash.tools.formats import CallFormat
from tests.tools.templates import DEEPSEEK, HERMES, TEMPLATES, tokenizer_of

slow = pytest.mark.slow

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}
USER = {"role": "user", "content": "2 + 3?"}
CALL = '{"name": "add", "%s": {"a": 2, "b": 3}}'
XML = (
    "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n"
    "<parameter=b>\n3\n</parameter>\n</function>\n</tool_call>"
)
TAGGED = "<tool_call>\n" + CALL % "arguments" + "\n</tool_call>"
HARMONY_CALL = 'to=functions.add <|constrain|>json<|message|>{"a": 2, "b": 3}<|call|>'


def made(name):
    template, eos = TEMPLATES[name]
    tokenizer = tokenizer_of(template, eos)
    return tokenizer, CallFormat(tokenizer, ChatTemplate(tokenizer), [ADD])


def encoded(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


SAID = [
    ("hermes", TAGGED + "<|im_end|>", "", 1),
    ("hermes", "<think>hm</think>\n\nSo:\n" + TAGGED + "\n" + TAGGED + "<|im_end|>", "So:", 2),
    ("qwen3_coder", XML + "<|im_end|>", "", 1),
    ("qwen3_coder", "So:\n" + XML + "\n" + XML + "<|im_end|>", "So:", 2),
    ("llama3_json", CALL % "parameters" + "<|eot_id|>", "", 1),
    ("llama3_json", "<|python_tag|>" + CALL % "parameters" + "<|eot_id|>", "", 1),
    ("pythonic", "[add(a=2, b=3)]<|eot_id|>", "", 1),
    ("pythonic", "<|python_tag|>[add(a=2, b=3), add(b=3, a=2)]<|eot_id|>", "", 2),
    ("harmony", "<|channel|>commentary " + HARMONY_CALL, "", 1),
    (
        "harmony",
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>commentary<|message|>"
        "So:<|end|><|start|>assistant<|channel|>commentary " + HARMONY_CALL,
        "So:",
        1,
    ),
]


@pytest.mark.parametrize(("name", "said", "text", "calls"), SAID)
def test_calls_are_read_and_their_results_written_as_the_template_has_them(name, said, text, calls):
    tokenizer, form = made(name)
    template = ChatTemplate(tokenizer)
    prompt, sampled = template.prompt([USER], form.shown), encoded(tokenizer, said)
    read = form.read(prompt, sampled)
    assert [(c.name, json.loads(c.arguments)) for c in read.calls] == [
        ("add", {"a": 2, "b": 3})
    ] * calls
    assert read.text.strip() == text
    assert sampled[-1] in form.stop_token_ids
    # What follows is what the template writes after these very calls.
    answers = [f"result {number}" for number in range(calls)]
    functions = [{"name": "add", "arguments": {"a": 2, "b": 3}} for _ in read.calls]
    messages = [
        USER,
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function} for function in functions],
        },
        *({"role": "tool", "content": answer} for answer in answers),
    ]
    whole = template.render(messages, form.shown)
    between = form.results(read.calls, answers, sampled=sampled)
    end = tokenizer.decode([sampled[-1]])
    assert whole.endswith(end + tokenizer.decode(between))
    assert tokenizer.decode(between).count("result ") == calls


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_without_a_call_is_an_answer(name):
    tokenizer, form = made(name)
    before = "<|channel|>final<|message|>" if name == "harmony" else ""
    said = encoded(tokenizer, f'{before}It is {{"name": 5}}.{tokenizer.eos_token}')
    read = form.read(ChatTemplate(tokenizer).prompt([USER], form.shown), said)
    assert (read.text, read.calls, read.wrong) == ('It is {"name": 5}.', [], "")


@pytest.mark.parametrize(
    ("name", "said", "why"),
    [
        ("hermes", '<tool_call>{"name": "add", }</tool_call><|im_end|>', "not in the format"),
        ("hermes", '<tool_call>{"nome": "add"}</tool_call><|im_end|>', "not in the format"),
        ("llama3_json", '{"name": "add", "parameters": {<|eot_id|>', "not in the format"),
        ("harmony", "<|channel|>commentary to=functions.add<|message|>{<|call|>", "not in the"),
        ("pythonic", "[add(a=2, b=open('x'))]<|eot_id|>", "not in the format"),
        ("pythonic", "[add(a=2, b=3)]", "cut off"),
        ("hermes", TAGGED, "cut off"),
    ],
)
def test_a_call_that_can_not_be_read_is_told_as_such(name, said, why):
    tokenizer, form = made(name)
    read = form.read(ChatTemplate(tokenizer).prompt([USER]), encoded(tokenizer, said))
    assert not read.calls
    assert why in read.wrong


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (HERMES.replace("{{ tools | tojson }}", ""), "shows no tools"),
        (HERMES.replace("<tool_call>", "CALL"), "how the model calls tools is not known"),
        (
            HERMES.replace("{{ m.content }}\n</tool", "\n</tool"),
            "shows 'result-words' 0 times",
        ),
        (
            HERMES.replace("{% if m.role == 'tool' %}", "{% if loop.last %}{% endif %}"
            "{% if m.role == 'tool' %}{{ messages | length }}"),
            "around the result of a tool call",
        ),
    ],
)  # fmt: skip
def test_a_template_that_does_not_serve_is_refused_with_the_remedy(template, why):
    tokenizer = tokenizer_of(template)
    with pytest.raises(ValueError, match=f"{why}(?s:.)*leave agent.tools and agent.mcp out"):
        CallFormat(tokenizer, ChatTemplate(tokenizer), [ADD])


def test_a_model_that_calls_no_tools_is_refused_before_anything_starts():
    config = load(
        "frozen_lake", {"agent.style": "chat", "agent.mcp": [{"url": "http://127.0.0.1:1/mcp"}]}
    )
    make_style(config, tokenizer_of(HERMES))
    with pytest.raises(
        ValueError, match=r"agent\.style='chat' .*shows no tools: leave agent\.tools"
    ):
        make_style(config, tokenizer_of(HERMES.replace("{{ tools | tojson }}", "")))


@slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's, of what vLLM imports
def test_a_parser_of_vllm_reads_what_nothing_else_does():
    pytest.importorskip("vllm")
    tokenizer = tokenizer_of(DEEPSEEK)
    template = ChatTemplate(tokenizer)
    with pytest.raises(ValueError, match=r"is none of .*: .*name a parser of vLLM's"):
        CallFormat(tokenizer, template, [ADD])
    with pytest.raises(ValueError, match="tool_parser='hermes' does not read a call as"):
        CallFormat(tokenizer, template, [ADD], parser="hermes")
    with pytest.raises(ValueError, match="tool_parser='deepsea' is none of vLLM's: .*, hermes,"):
        CallFormat(tokenizer, template, [ADD], parser="deepsea")
    form = CallFormat(tokenizer, template, [ADD], parser="deepseek_v3")
    prompt = template.prompt([USER], form.shown)
    arguments = {"a": 2, "b": 3}
    calls = [{"type": "function", "function": {"name": "add", "arguments": arguments}}] * 2
    said = template.render(
        [USER, {"role": "assistant", "content": "So:", "tool_calls": calls}],
        {**form.shown, "add_generation_prompt": False},
    )
    sampled = encoded(tokenizer, said.removeprefix(tokenizer.decode(prompt)).rstrip())
    read = form.read(prompt, sampled)
    assert [(c.name, json.loads(c.arguments)) for c in read.calls] == [("add", arguments)] * 2
    assert read.text == "So:"
    assert form.read(prompt, sampled[:-1]).wrong == "the answer was cut off, being too long"
    read = form.read(prompt, encoded(tokenizer, "It is 5.<|im_end|>"))
    assert (read.text, read.calls, read.wrong) == ("It is 5.", [], "")


def test_a_style_is_told_of_the_parser_that_reads_its_calls(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    style = ChatStyle(tokenizer_of(HERMES), tool_parser="hermes")
    with pytest.raises(ValueError, match=r"tool_parser='hermes' is vLLM's, which is not installed"):
        style.calling([ADD])
