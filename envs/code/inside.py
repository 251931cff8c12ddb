"""What runs in a sandbox: it answers calls of an answer's code there, or judges what came of them.

It is handed to the sandbox's Python as a text, with standard input and output in JSON:

    python -I -c TEXT answer < {"code": …, "setup": …, "requests": […]}   > a line for each request
    python -I -c TEXT judge  < {"setup": …, "assertions": […]}            > [true, false, …]

The two never share a sandbox. Whoever answers calls may be what it likes: it knows no expected
value, and all that comes of it is data.
"""

import itertools
import json
import os
import sys
import traceback
import types
from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any, TextIO

SETUP_FAILED = 3  # the exit code of a judge
_MOST_ITEMS = 100_000  # that are taken of an iterator
_KINDS: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset, "bytes": bytes}


def answer(told: dict[str, Any], out: TextIO) -> None:
    """Of each request a line: `value`, or what was `raised`.

    A request is an `expression`, or a `call` by name with `arguments`; of a class `Solution`, if
    there is one with such a method.
    """
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    names = vars(module)
    exec(compile(told["code"], "solution.py", "exec"), names)
    exec(compile(told["setup"], "setup.py", "exec"), names)
    for request in told["requests"]:
        try:
            line = {"value": encoded(_value(request, names))}
        except BaseException as error:  # SystemExit too
            line = {"raised": f"{type(error).__name__}: {error}"}
        print(json.dumps(line), file=out, flush=True)


def _value(request: dict[str, Any], names: dict[str, Any]) -> Any:
    if "expression" in request:
        return eval(compile(request["expression"], "test.py", "eval"), names)
    name, arguments = request["call"], request["arguments"]
    if hasattr(names.get("Solution"), name):
        return getattr(names["Solution"](), name)(*arguments)
    return names[name](*arguments)


def judge(told: dict[str, Any], out: TextIO) -> None:
    """Whether each assertion holds: a `test` over `_values`, which are lines of `answer`."""
    names: dict[str, Any] = {}
    try:
        exec(compile(told["setup"], "setup.py", "exec"), names)
    except BaseException:  # SystemExit too
        traceback.print_exc()
        sys.exit(SETUP_FAILED)
    json.dump([_holds(each["test"], each["values"], names) for each in told["assertions"]], out)


def _holds(test: str, lines: list[str], names: dict[str, Any]) -> bool:
    try:
        values = [decoded(json.loads(line)["value"]) for line in lines]
        return bool(eval(test, {**names, "_values": values}))
    except Exception:  # the value is not what the test can do with
        return False


def encoded(value: Any) -> Any:
    """Python's plain data as JSON. TypeError for what is none."""
    kind: str
    items: Any
    if hasattr(value, "tolist"):  # of NumPy
        value = value.tolist()
    match value:
        case None | bool():
            return value
        case int() | float() | str():  # of a subclass, too
            return next(kind(value) for kind in (int, float, str) if isinstance(value, kind))
        case list():
            return [encoded(item) for item in value]
        case dict():
            kind, items = "dict", map(list, value.items())
        case complex():
            kind, items = "complex", [value.real, value.imag]
        case range():
            kind, items = "range", [value.start, value.stop, value.step]
        case Iterator() | KeysView() | ValuesView() | ItemsView():
            kind, items = "iterator", itertools.islice(value, _MOST_ITEMS)
        case tuple() | set() | frozenset() | bytes():
            kind, items = next(k for k, made in _KINDS.items() if isinstance(value, made)), value
        case _:
            raise TypeError(f"a {type(value).__name__} is no plain data")
    return {kind: [encoded(item) for item in items]}


def decoded(value: Any) -> Any:
    """What `encoded` made JSON of; an iterator is one again. Raises for what it never made."""
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    if kind == "dict":
        return {decoded(key): decoded(item) for key, item in items}
    if kind in ("complex", "range"):
        return (complex if kind == "complex" else range)(*items)
    make = iter if kind == "iterator" else _KINDS[kind]
    return make([decoded(item) for item in items])


def main(role: str) -> None:
    told = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the code prints is no answer
    {"answer": answer, "judge": judge}[role](told, out)
    out.flush()


if __name__ == "__main__":
    main(sys.argv[1])
