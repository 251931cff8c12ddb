"""docs/api.md names what can be imported, with its parameters; and what it names is there."""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import flash

PAGE = (Path(__file__).parents[1] / "docs/api.md").read_text()
OF_FLASH, OF_MODULES = PAGE.split("\n## Under their own modules\n")
TOLD = re.compile(r"`(\.?\w+)(?:\(([^`]*)\))?`")
LEFT_OUT = "…"


def rows(text: str) -> list[list[str]]:
    """The cells of each row of its tables, without their heads."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert cells
    return cells


ENTRIES = {
    name: (signature, TOLD.findall(about))
    for names, about in rows(OF_FLASH)
    for name, signature in TOLD.findall(names)
}


def test_the_page_has_each_exported_name_once():
    told = [name for names, _ in rows(OF_FLASH) for name, _ in TOLD.findall(names)]
    assert sorted(told) == sorted(flash.__all__)


@pytest.mark.parametrize("name", ENTRIES)
def test_parameters_and_methods_are_those_of_the_code(name):
    signature, methods = ENTRIES[name]
    exported = getattr(flash, name)
    check_parameters(signature, exported, f"{name}")
    for method, arguments in methods:
        if method.startswith("."):
            check_attribute(exported, method[1:], arguments, f"{name}{method}")


def test_names_under_their_own_modules_are_there():
    for module, names in rows(OF_MODULES):
        for name, _ in TOLD.findall(names):
            found = importlib.import_module(module.strip("`"))
            assert hasattr(found, name), f"{module}.{name}"


def check_attribute(owner: Any, name: str, arguments: str, where: str) -> None:
    if hasattr(owner, name):
        check_parameters(arguments, getattr(owner, name), where, bound=True)
    else:
        assert re.search(rf"\bself\.{name}\b", inspect.getsource(owner)), where


def check_parameters(told: str, function: Any, where: str, *, bound: bool = False) -> None:
    """What is told of a signature is true; and it is all, unless the page says otherwise."""
    if not told:
        return
    whole = LEFT_OUT not in told
    (of_page,) = ast.parse(f"def f({told.replace(LEFT_OUT, '').rstrip(', *')}): ...").body
    assert isinstance(of_page, ast.FunctionDef)
    arguments = of_page.args
    real = list(inspect.signature(function).parameters.values())[bound:]
    positional = [p.name for p in real if p.kind is p.POSITIONAL_OR_KEYWORD]
    by_name = {p.name: p for p in real}
    told_positional = [argument.arg for argument in arguments.args]
    told_names = told_positional + [argument.arg for argument in arguments.kwonlyargs]
    assert told_positional == positional[: len(told_positional)], where
    assert set(told_names) <= by_name.keys(), where
    if whole:
        assert set(told_names) == by_name.keys(), where
    defaults = [*zip(told_positional[::-1], arguments.defaults[::-1], strict=False)]
    defaults += zip((a.arg for a in arguments.kwonlyargs), arguments.kw_defaults, strict=True)
    for name, default in defaults:
        if default is not None:
            assert ast.literal_eval(default) == by_name[name].default, f"{where}: {name}"
