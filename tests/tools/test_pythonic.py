"""Calls as a list of Python's: what they say, and that nothing of them is run."""

import json

import pytest

from flash.tools.pythonic import pythonic_calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[f(a=1)]", [("f", {"a": 1})]),
        ("  [f(a='x, y(z=1)]'), g.h()]\n", [("f", {"a": "x, y(z=1)]"}), ("g.h", {})]),
        ("<|python_start|>[f(a=-1.5)]<|python_end|>", [("f", {"a": -1.5})]),
        ("[f(a=True, b=false, c=None, d=null)]",
         [("f", {"a": True, "b": False, "c": None, "d": None})]),
        ("[f(a=[1, {'b': true}], c=(1, 2))]", [("f", {"a": [1, {"b": True}], "c": [1, 2]})]),
        (r"[f(a='\d')]", [("f", {"a": r"\d"})]),
        ("[1, 2]", []),
        ("I call [f(a=1)].", []),
        ("f(a=1)", []),
        ("", []),
    ],
)  # fmt: skip
def test_a_response_of_calls_alone_is_read_as_these(text, calls):
    read = pythonic_calls(text)
    assert [(call.name, json.loads(call.arguments)) for call in read] == calls
    assert len({call.id for call in read}) == len(calls)


@pytest.mark.parametrize(
    "text",
    [
        "[f(1)]",
        "[f(a=1), 2]",
        "[f(a=1, a=2)]",
        "[f(**{'a': 1})]",
        "[f(a=x)]",
        "[f(a=__import__('os').system('true'))]",
        "[f(a=2 ** 9 ** 9)]",
        "[f()(a=1)]",
        "[f(a=1) for a in b]",
        "[f(a=b'x')]",
        "[f(a={1, 2})]",
        "[f(a=1e999)]",
        "[f(a=...)]",
        "[f(a=1)",
        "[f(a=" + "9" * 5000 + ")]",
        "[f(a=" + "[" * 5000 + ")]",
        "[f(a=" + "-" * 5000 + "1)]",
    ],
)
def test_what_begins_as_calls_and_is_more_than_literals_is_refused(text):
    with pytest.raises(ValueError, match="no list of calls with literals as arguments"):
        pythonic_calls(text)
