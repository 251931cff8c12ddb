"""When a game is won: its PDDL goal, grounded once so that checking it costs microseconds."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import product

from .grammar import Atom, Fact, Facts, answers

_Tree = str | list["_Tree"]


@dataclass(frozen=True, slots=True)
class _Clause:
    """`exists` variables of these types such that all atoms hold and each pair differs."""

    types: dict[str, str]
    atoms: list[Atom]
    different: list[tuple[str, str]]


class Goal:
    """A conjunction of existential clauses over facts, in lower case: every ALFWorld goal is one.

    `objects` gives the type of each identifier, `entity` its number in the facts. Facts of the
    predicates in `changing` are asked for when the goal is checked; all others are settled here.
    Raises ValueError on any other kind of goal.
    """

    def __init__(
        self,
        text: str,
        objects: Mapping[str, str],
        entity: Mapping[str, int],
        facts: Facts,
        *,
        changing: Collection[str],
    ) -> None:
        tree = _parse(text)
        conjuncts = tree[1:] if tree[0] == "and" else [tree]
        self._clauses: list[list[tuple[tuple[str, Fact], ...]]] = []
        for conjunct in conjuncts:
            clause = _Clause({}, [], [])
            _flatten(conjunct, clause)
            self._clauses.append(list(_ground(clause, objects, entity, facts, changing)))

    def holds(self, facts: Facts) -> bool:
        """Whether the goal is fulfilled under these facts."""
        return all(
            any(all(fact in facts[predicate] for predicate, fact in way) for way in ways)
            for ways in self._clauses
        )


def _ground(
    clause: _Clause,
    objects: Mapping[str, str],
    entity: Mapping[str, int],
    facts: Facts,
    changing: Collection[str],
) -> Iterable[tuple[tuple[str, Fact], ...]]:
    """Every way to fulfil the clause, as the changing facts that it takes."""
    constants = {name: entity[name] for name in objects}
    for atom in clause.atoms:
        if atom.predicate not in facts:
            raise ValueError(f"the goal asks for the unknown predicate {atom.predicate!r}")
        for name in atom.variables:
            if name not in clause.types and name not in constants:
                raise ValueError(f"the goal mentions {name!r}, which is not declared")
    used = {name for atom in clause.atoms for name in atom.variables}
    start = {name: constants[name] for name in used if name not in clause.types}
    fixed = [atom for atom in clause.atoms if atom.predicate not in changing]
    asked = [atom for atom in clause.atoms if atom.predicate in changing]
    of_type: dict[str, list[int]] = {}
    for name, type_ in objects.items():
        of_type.setdefault(type_, []).append(entity[name])
    for binding in answers(fixed, start, facts, distinct=False):
        free = [name for name in clause.types if name not in binding]
        for values in product(*(of_type.get(clause.types[name], ()) for name in free)):
            full = {**binding, **dict(zip(free, values, strict=True))}
            if all(full[a] != full[b] for a, b in clause.different):
                yield tuple(
                    (atom.predicate, tuple([full[name] for name in atom.variables]))
                    for atom in asked
                )


def _flatten(tree: _Tree, clause: _Clause) -> None:
    match tree:
        case ["and", *parts]:
            for part in parts:
                _flatten(part, clause)
        case ["exists", [*declared], body]:
            names: list[str] = []
            words = iter(declared)
            for word in words:
                if not isinstance(word, str):
                    raise ValueError("the goal declares a variable that is not a name")
                if word != "-":
                    names.append(word)
                    continue
                type_ = next(words, "")
                for name in names:
                    if name in clause.types:
                        raise ValueError(f"the goal declares {name!r} twice in one clause")
                    clause.types[name] = str(type_)
                names.clear()
            _flatten(body, clause)
        case ["not", ["=", str(a), str(b)]]:
            clause.different.append((a, b))
        case [str(predicate), *arguments] if predicate not in {"not", "or", "forall", "imply"}:
            variables = tuple(a for a in arguments if isinstance(a, str))
            if len(variables) != len(arguments):
                raise ValueError(f"cannot read {tree!r} in the goal")
            clause.atoms.append(Atom(predicate, variables))
        case _:
            raise ValueError(f"cannot read {tree!r} in the goal")


def _parse(text: str) -> list[_Tree]:
    stack: list[list[_Tree]] = [[]]
    for token in re.findall(r"[()]|[^\s()]+", text):
        if token == "(":
            stack.append([])
        elif token == ")":
            if len(stack) < 2:
                raise ValueError("the goal closes a bracket too many")
            done = stack.pop()
            stack[-1].append(done)
        else:
            stack[-1].append(token)
    if len(stack) != 1 or len(stack[0]) != 1 or not isinstance(stack[0][0], list):
        raise ValueError("the goal is not one bracketed condition")
    return stack[0][0]
