"""Constraints, as the grammars of XGrammar read them: in each format that models call tools in."""

import json

import pytest

from flash.conversation import ChatTemplate
from flash.door.constraint import Constraints
from flash.door.demand import Asked, Demand
from flash.door.errors import ApiError
from flash.tools.formats import FORMATS
from tests.tools.templates import TEMPLATES, tokenizer_of

pytestmark = pytest.mark.slow
xgrammar = pytest.importorskip("xgrammar", reason="XGrammar comes with vLLM: make setup-vllm")

SCHEMA = {
    "type": "object",
    "properties": {"to": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["to"],
    "additionalProperties": False,
}
ASKED = Asked(field="tool_choice", value="required")
HERMES_CALL = '<tool_call>\n{"name": "move", "arguments": {"to": "x"}}\n</tool_call>'
CALLS = {
    "hermes": HERMES_CALL,
    "qwen3_coder": "<tool_call>\n<function=move>\n<parameter=to>\nx\n</parameter>\n</function>\n"
    "</tool_call>",
    "llama3_json": '{"name": "move", "parameters": {"to": "x"}}',
}


def constraints(name) -> Constraints:
    tokenizer = tokenizer_of(*TEMPLATES[name])
    template = ChatTemplate(tokenizer)
    return Constraints(tokenizer, template, FORMATS[name], template.stop_token_ids)


def accepts(name, text, **demand) -> bool:
    of = constraints(name)
    tag = of.of(
        Demand(asked=ASKED, **demand), of._template.prompt([{"role": "user", "content": ""}])
    )
    grammar = xgrammar.Grammar.from_structural_tag(tag)
    return xgrammar.testing._is_grammar_accept_string(grammar, text)


@pytest.mark.parametrize("name", CALLS)
def test_a_demanded_call_is_in_the_models_own_format(name):
    must = {"calls": {"move": SCHEMA}, "must_call": True}
    call = CALLS[name]
    assert accepts(name, call, **must)
    assert not accepts(name, f"Well. {call}", **must)
    assert not accepts(name, call.replace("move", "fly"), **must)
    assert not accepts(name, call[:-1], **must)
    assert not accepts(name, "", **must)


def test_arguments_keep_to_their_schema():
    must = {"calls": {"move": SCHEMA}, "must_call": True}
    assert not accepts("hermes", HERMES_CALL.replace('"to"', '"from"'), **must)
    assert not accepts("qwen3_coder", CALLS["qwen3_coder"].replace("=to>", "=from>"), **must)


def test_several_calls_follow_each_other_as_the_template_writes_them_or_not():
    must = {"calls": {"move": SCHEMA}, "must_call": True}
    assert accepts("hermes", 2 * HERMES_CALL, **must)
    assert not accepts("hermes", 2 * HERMES_CALL, **must, one_call=True)
    assert not accepts("llama3_json", 2 * CALLS["llama3_json"], **must)


def test_a_thought_comes_first_if_at_all():
    must = {"calls": {"move": SCHEMA}, "must_call": True}
    assert accepts("hermes", f"<think>Where, {{</think>\n\n{HERMES_CALL}", **must)
    assert not accepts("hermes", f"<think>Where {HERMES_CALL}", **must)
    assert accepts("hermes", '<think>hm</think>{"to": "x"}', answer=SCHEMA)


def test_words_and_calls_of_strict_tools_go_together():
    free = {"calls": {"move": SCHEMA}}
    assert accepts("hermes", "No.", **free)
    assert accepts("hermes", f"Well. {HERMES_CALL}", **free)
    assert not accepts("hermes", f"Well. {HERMES_CALL.replace('x', 'y', 1)[:-3]}", **free)
    assert not accepts("hermes", HERMES_CALL.replace('"x"', "5"), **free)


def test_an_answer_is_a_call_or_keeps_to_its_schema():
    either = {"calls": {"move": {"type": "object"}}, "answer": SCHEMA}
    assert accepts("hermes", HERMES_CALL, **either)
    assert accepts("hermes", json.dumps({"to": "x", "n": 3}), **either)
    assert not accepts("hermes", json.dumps({"n": 3}), **either)


def test_harmonys_thoughts_are_in_no_plain_words():
    with pytest.raises(ApiError, match="thoughts end"):
        accepts("harmony", "", calls={"move": SCHEMA}, must_call=True)
