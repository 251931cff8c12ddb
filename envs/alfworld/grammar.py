"""The texts of a game: TextWorld's context-sensitive grammar, as far as ALFWorld's files use it.

A game file carries its own grammar, a document of rules in JSON and one block per action:

    grammar :: \"\"\" {"OpenObject.feedback": [{"rhs": "You open the {r.name}. ..."}], ...} \"\"\";
    action OpenObject { template :: "open {r}";  feedback :: "#OpenObject.feedback#"; }

In a right-hand side `#name#` is another rule, `{o.name}` an expression over bound variables,
`{expression | query}` one copy of the expression per answer to a query over the facts, and
`[{expression | query}]` the same as an English list. A rule is an ordered list of alternatives;
the first whose condition has an answer is taken.

What cannot be read the way TextWorld reads it is a ValueError when the game is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

Fact = tuple[int, ...]
Facts = Mapping[str, Collection[Fact]]
"""The answers of each predicate. Entities are numbers that sort as their identifiers do."""
Binding = Mapping[str, int]
"""Which entity each variable stands for."""


@dataclass(frozen=True, slots=True)
class Names:
    """What an entity is called, and its identifier in the problem; both indexed by entity."""

    name: Sequence[str]
    id: Sequence[str]


@dataclass(frozen=True, slots=True)
class Atom:
    """A predicate over variables, for example `inreceptacle(o, r)`."""

    predicate: str
    variables: tuple[str, ...]


def answers(
    atoms: Sequence[Atom], binding: Binding, facts: Facts, *, distinct: bool
) -> Iterator[dict[str, int]]:
    """Every extension of the binding under which all atoms are facts, in TextWorld's order.

    With `distinct`, two variables never stand for the same entity, as in TextWorld's queries;
    without it they may, as in PDDL.
    """
    if not atoms:
        yield dict(binding)
        return
    atom, rest = atoms[0], atoms[1:]
    matches: list[Fact] = []
    free = [v for v in atom.variables if v not in binding]
    if not free:
        if tuple([binding[v] for v in atom.variables]) in facts[atom.predicate]:
            yield from answers(rest, binding, facts, distinct=distinct)
        return
    bound = [(i, binding[v]) for i, v in enumerate(atom.variables) if v in binding]
    for fact in facts[atom.predicate]:
        for i, entity in bound:
            if fact[i] != entity:
                break
        else:
            matches.append(fact)
    taken = set(binding.values()) if distinct else frozenset()
    for fact in sorted(matches):
        extended = dict(binding)
        for variable, entity in zip(atom.variables, fact, strict=True):
            if extended.setdefault(variable, entity) != entity:
                break
        else:
            new = {extended[v] for v in free}
            if distinct and (len(new) < len(set(free)) or not taken.isdisjoint(new)):
                continue
            yield from answers(rest, extended, facts, distinct=distinct)


@dataclass(frozen=True, slots=True)
class _Rule:
    """`#name#`: the text of another rule."""

    name: str


@dataclass(frozen=True, slots=True)
class _Expression:
    """`{o.indefinite + ' ' + o.name}`: constants, and names (or identifiers) of variables."""

    terms: tuple[str | tuple[str, bool], ...]  # a constant, or (variable, whether its name)


@dataclass(frozen=True, slots=True)
class _Each:
    """`{item | query}`: the item once per answer; `as_list` puts separators between."""

    item: _Rule | _Expression
    query: tuple[Atom, ...]
    as_list: bool


_Part = str | _Rule | _Expression | _Each
_Template = tuple[_Part, ...]
_Alternative = tuple[tuple[Atom, ...], _Template]  # condition, right-hand side


@dataclass(frozen=True, slots=True)
class ActionText:
    """How an action is worded: the command that asks for it and the answer it gives."""

    command: _Template
    feedback: _Template


class Grammar:
    """All texts of one game, compiled. Holds no state: any number of threads may render.

    `actions` is keyed by action name in lower case. `signatures` gives, in lower case, the types
    of each predicate that rules may ask for; asking for another is a ValueError.
    """

    def __init__(
        self, document: str, *, actions: Iterable[str], signatures: Mapping[str, Sequence[str]]
    ) -> None:
        blocks, raw_rules = _read_document(document)
        self._signatures = signatures
        self._types: dict[str, str] = {}
        self._rules: dict[str, list[_Alternative]] = {}
        self.actions: dict[str, ActionText] = {}
        pending = ["intro", "list_empty", "list_separator", "list_last_separator"]
        for action in actions:
            if action not in blocks:
                raise ValueError(f"no 'action {action}' block with its template and feedback")
            command, feedback = blocks[action]
            self.actions[action] = ActionText(self._compile(command), self._compile(feedback))
            pending += _mentioned(self.actions[action].command)
            pending += _mentioned(self.actions[action].feedback)
        # Only what can be reached: the stock grammar has rules that nothing uses and that
        # TextWorld itself could not render.
        while pending:
            name = pending.pop()
            if name in self._rules:
                continue
            if not raw_rules.get(name):
                raise ValueError(f"rule '#{name}#' is used and not defined")
            self._rules[name] = [
                (self._query(rule.get("condition", "")), self._compile(rule.get("rhs", "")))
                for rule in raw_rules[name]
            ]
            for _, template in self._rules[name]:
                pending += _mentioned(template)

    def render(self, template: _Template, binding: Binding, facts: Facts, names: Names) -> str:
        """The text of a template when the variables and facts are these."""
        out: list[str] = []
        self._render(template, binding, facts, names, out)
        return "".join(out)

    def render_rule(self, name: str, binding: Binding, facts: Facts, names: Names) -> str:
        """The text of a rule, for example "intro"."""
        return self.render((_Rule(name),), binding, facts, names)

    def _render(
        self, template: _Template, binding: Binding, facts: Facts, names: Names, out: list[str]
    ) -> None:
        for part in template:
            if isinstance(part, str):
                out.append(part)
            elif isinstance(part, _Rule):
                rhs = self._choose(part.name, binding, facts)
                self._render(rhs, binding, facts, names, out)
            elif isinstance(part, _Expression):
                for term in part.terms:
                    if isinstance(term, str):
                        out.append(term)
                    else:
                        variable, by_name = term
                        source = names.name if by_name else names.id
                        out.append(source[binding[variable]])
            else:
                items = [
                    self.render((part.item,), answer, facts, names)
                    for answer in answers(part.query, binding, facts, distinct=True)
                ]
                if part.as_list and len(items) != 1:
                    self._list(items, binding, facts, names, out)
                else:
                    out += items

    def _choose(self, name: str, binding: Binding, facts: Facts) -> _Template:
        for condition, rhs in self._rules[name]:
            if not condition:
                return rhs
            if next(answers(condition, binding, facts, distinct=True), None) is not None:
                return rhs
        raise ValueError(f"no alternative of '#{name}#' applies")

    def _list(
        self, items: list[str], binding: Binding, facts: Facts, names: Names, out: list[str]
    ) -> None:
        if not items:
            out.append(self.render_rule("list_empty", binding, facts, names))
            return
        separator = self.render_rule("list_separator", binding, facts, names)
        out.append(separator.join(items[:-1]))
        out.append(self.render_rule("list_last_separator", binding, facts, names))
        out.append(items[-1])

    def _compile(self, text: str) -> _Template:
        parts: list[_Part] = []
        position = 0
        while position < len(text):
            # TextWorld's reader skips white space and comments where a token starts a line, and
            # tabs before any token. At what it cannot read it stops without a word: the text of
            # a goal with a semicolon ends there.
            if position == 0 or text[position - 1] == "\n":
                position = _end(_LINE_START, text, position)
            position = _end(_TABS, text, position)
            match = _TOKEN.match(text, position)
            if match is None:
                break
            position = match.end()
            if (literal := match["literal"] or match["quoted"]) is not None:
                parts.append(literal)
            elif match["rule"] is not None:
                parts.append(_Rule(match["rule"]))
            else:
                parts.append(self._each(match["list"] or match["each"], bool(match["list"])))
        return tuple(parts)

    def _each(self, braces: str, as_list: bool) -> _Each | _Expression:
        text, bar, query = braces.strip("[]")[1:-1].partition("|")
        text = text.strip()
        item: _Rule | _Expression
        if text.startswith("#") and text.endswith("#"):
            item = _Rule(text[1:-1])
        else:
            item = _expression(text)
        if not bar and not as_list and isinstance(item, _Expression):
            return item
        return _Each(item, self._query(query), as_list)

    def _query(self, text: str) -> tuple[Atom, ...]:
        atoms = []
        for term in filter(None, (t.strip() for t in text.split("&"))):
            match = _ATOM.fullmatch(term)
            if match is None:
                raise ValueError(f"cannot read {term!r} in the query {text!r}")
            predicate = match["predicate"]
            variables = [v.partition(":") for v in re.split(r"\s*,\s*", match["variables"])]
            signature = self._signatures.get(predicate.removeprefix("not_"))
            if signature is None or list(signature) != [t.strip() for _, _, t in variables]:
                raise ValueError(f"the query {text!r} asks for {term!r}, which no fact can match")
            for name, _, type_ in variables:
                if self._types.setdefault(name.strip(), type_.strip()) != type_.strip():
                    raise ValueError(f"variable {name!r} has two types in the grammar")
            atoms.append(Atom(predicate, tuple(name.strip() for name, _, _ in variables)))
        return tuple(atoms)


_LINE_START = re.compile(r"(?:\s+|//[^\n]*)*")
_TABS = re.compile(r"\t*")
_TOKEN = re.compile(
    r"(?P<list>\[\{[^{}\[\]]*\}\])"
    r"|(?P<each>\{[^{}\[\]]*\})"
    r"|#(?P<rule>[\w()/!<>\-\s,.]+)#"
    r"|\"(?P<quoted>[^;|\"<>\[\]#{}]*)\""
    r"|(?P<literal>[^;|\"<>\[\]#{}]+)"
)
_ATOM = re.compile(r"(?P<predicate>[\w-]+)\s*\(\s*(?P<variables>[^()]*?)\s*\)")
_TERM = re.compile(r"'(?P<constant>[^']*)'|(?P<variable>\w+)(?:\.(?P<attribute>\w+))?")
_DOCUMENT_TOKEN = re.compile(r'"""(.*?)"""|"([^"]*)"|([\w/-]+)|(::|[{};])|\s+|#[^\n]*', re.DOTALL)


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


def _expression(text: str) -> _Expression:
    terms: list[str | tuple[str, bool]] = []
    for piece in text.split("+"):
        # "r.name or r.id": every entity has a name.
        match = _TERM.fullmatch(piece.partition(" or ")[0].strip())
        if match is None:
            raise ValueError(f"cannot read the expression {text!r}")
        if match["constant"] is not None:
            terms.append(match["constant"])
        elif match["attribute"] in {None, "name"}:
            terms.append((match["variable"], True))
        elif match["attribute"] == "id":
            terms.append((match["variable"], False))
        elif match["attribute"] == "indefinite":
            terms.append("a")  # of every entity: hence "a armchair 1"
        elif match["attribute"] == "definite":
            terms.append("the")
        else:
            raise ValueError(f"unknown attribute in the expression {text!r}")
    return _Expression(tuple(terms))


def _mentioned(template: _Template) -> list[str]:
    items = [part.item if isinstance(part, _Each) else part for part in template]
    return [item.name for item in items if isinstance(item, _Rule)]


def _read_document(
    document: str,
) -> tuple[dict[str, tuple[str, str]], dict[str, list[dict[str, str]]]]:
    """The (template, feedback) of each action, in lower case, and the rules by name."""
    blocks: dict[str, tuple[str, str]] = {}
    rules: dict[str, list[dict[str, str]]] = {}
    words: list[str] = []
    action: dict[str, str] = {}
    position = 0
    while position < len(document):
        match = _DOCUMENT_TOKEN.match(document, position)
        if match is None:
            raise ValueError(f"cannot read the grammar at {document[position : position + 40]!r}")
        position = match.end()
        block, string, word, mark = match.groups()
        if word is not None:
            words.append(word)
        elif string is not None and words:
            action[words.pop()] = string
        elif block is not None:
            if words.pop() == "grammar":
                if action:  # TextWorld allows comment lines in an action's rules only
                    block = re.sub(r"(?m)^\s*#.*$", "", block)
                rules.update(json.loads(block))
        elif mark == "{":
            action = {"action": words.pop()}
            words.clear()
        elif mark == "}":
            if not {"template", "feedback"} <= action.keys():
                raise ValueError(f"action {action.get('action')} lacks template or feedback")
            blocks[action["action"].lower()] = (action["template"], action["feedback"])
            action = {}
    return blocks, rules
