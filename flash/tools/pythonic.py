"""Calls that are written as a list of Python's, `[add(a=1, b=2)]`: parsed, and never evaluated."""

import ast
import json
import re
import warnings
from collections.abc import Sequence
from typing import Any

from flash.tools.tool import ToolCall

_MARKERS = re.compile(r"<\|python_(?:tag|start|end)\|>")
_BEGINS = re.compile(r"\[\s*[A-Za-z_][\w.]*\s*\(")
_OF_JSON = {"true": True, "false": False, "null": None}
# What parsing raises for what is no Python, too deep, or no plain data.
_UNREADABLE = (SyntaxError, ValueError, TypeError, RecursionError, MemoryError)


def pythonic_calls(text: str) -> Sequence[ToolCall]:
    """The calls that a response consists of; none if it is another.

    Arguments are named, and literals of Python or JSON. ValueError for a response that begins as
    calls and can't be read as such.
    """
    code = _MARKERS.sub("", text).strip()
    if not _BEGINS.match(code):
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes such as \d
            listed = ast.parse(code, mode="eval").body
        if not isinstance(listed, ast.List):
            raise ValueError("no list")
        return [_call(node, number) for number, node in enumerate(listed.elts)]
    except _UNREADABLE as error:
        raise ValueError(f"no list of calls with literals as arguments: {error}") from error


def _call(node: ast.expr, number: int) -> ToolCall:
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("a call has named arguments only")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError("each argument has a name of its own")
        arguments[keyword.arg] = ast.literal_eval(_AsPython().visit(keyword.value))
    return ToolCall(
        id=f"call{number:05}",
        name=_name(node.func),
        arguments=json.dumps(arguments, allow_nan=False),
    )


def _name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise ValueError("a tool is called by its name")


class _AsPython(ast.NodeTransformer):
    """JSON's words for true, false and nothing become Python's."""

    def visit_Name(self, node: ast.Name) -> Any:
        return ast.Constant(_OF_JSON[node.id]) if node.id in _OF_JSON else node
