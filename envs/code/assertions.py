"""An assertion in two: what an answer's code is asked, and what must hold of what it answers.

    assert set(common([1, 2], [2])) == {2}
               └── asked ──────┘
           set(_values[0])          == {2}      judged, where that code is not

So no expected value comes near the code that is tested.
"""

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

_BUILTIN = frozenset(dir(builtins))
VALUES = "_values"


@dataclass(frozen=True, slots=True)
class Assertion:
    """`source` is what people read; the `expressions` are asked, `test` is over their values."""

    source: str
    expressions: tuple[str, ...]
    test: str


def split(source: str, known: frozenset[str], asked_for: frozenset[str] = frozenset()) -> Assertion:
    """`known` are the names that are not the answer's, beside the builtin ones; those `asked_for`
    are, whatever else they name: a problem may ask for a function `sum`.

    ValueError for what can't be split: no single assertion, or a call for each turn of a loop.
    """
    match _parsed(source).body:
        case [ast.Assert(test=test)]:
            pass
        case _:
            raise ValueError("it must be a single assert statement")
    in_loops = _bound(test)
    splitter = _Splitter((known | _BUILTIN | in_loops) - asked_for, in_loops=in_loops)
    judged = ast.unparse(ast.fix_missing_locations(cast(ast.expr, splitter.visit(test))))
    if not splitter.expressions:
        raise ValueError("it calls nothing that an answer could define")
    return Assertion(source.strip(), tuple(splitter.expressions), judged)


def defined(source: str) -> frozenset[str]:
    """The names that a text of Python defines. ValueError if it is none."""
    return _bound(_parsed(source))


def functions(source: str) -> frozenset[str]:
    """The names of its functions and classes, but for those within others. ValueError as above."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return frozenset(node.name for node in _parsed(source).body if isinstance(node, kinds))


def stands_alone(source: str, known: frozenset[str]) -> bool:
    """Whether it needs nothing but builtin names, those known, and its own."""
    used = {node.id for node in ast.walk(_parsed(source)) if isinstance(node, ast.Name)}
    return used <= _BUILTIN | known | defined(source)


class _Splitter(ast.NodeTransformer):
    """Puts `_values[i]` in the place of each call of the answer's, with what is called on it."""

    def __init__(self, known: frozenset[str], *, in_loops: frozenset[str]) -> None:
        self._known = known
        self._in_loops = in_loops
        self.expressions: list[str] = []

    def visit(self, node: ast.AST) -> ast.AST:
        *chain, root = _chain(node)
        if not isinstance(root, ast.Name) or root.id in self._known:
            return self.generic_visit(node)
        if not any(isinstance(each, ast.Call) for each in chain):
            raise ValueError(f"it names {root.id!r} without calling it")
        names = {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
        if names & self._in_loops:
            raise ValueError(f"it calls {root.id!r} within a loop: write an assertion for each")
        self.expressions.append(ast.unparse(node))
        place = ast.Constant(len(self.expressions) - 1)
        return ast.Subscript(ast.Name(VALUES, ast.Load()), place, ast.Load())


def _chain(node: ast.AST) -> Iterator[ast.AST]:
    """Of a(…).b[…] the whole, a(…).b, a(…) and a."""
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
        yield node
        node = node.func if isinstance(node, ast.Call) else node.value
    yield node


def _bound(tree: ast.AST) -> frozenset[str]:
    names = set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                names.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                names.add(name)
            case ast.alias(name=name, asname=other):
                names.add(other or name.partition(".")[0])
    return frozenset(names)


def _parsed(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"it is not Python: {error}") from error
