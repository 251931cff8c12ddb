"""What a client demands of an answer, whatever the policy would say, in words of all dialects."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jsonschema

from flash.door.errors import LEAVE_OUT, refused

Schema = Mapping[str, Any]
ANY_OBJECT: Schema = {"type": "object"}
# What grammars overlook of a schema (XGrammar 0.2.8).
_NOT_KEPT = {
    "not", "if", "then", "else", "multipleOf", "uniqueItems", "contains", "minContains",
    "maxContains", "propertyNames", "dependentRequired", "dependentSchemas",
}  # fmt: skip
# Their values are texts of the client's own names, or data.
_NAMED = {"properties", "$defs", "definitions", "patternProperties"}
_DATA = {"enum", "const", "default", "examples"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A field as a client wrote it, by which a demand is refused that can't be met."""

    field: str
    value: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which tools may be called: those with these `names`, or all; and how many."""

    asked: Asked
    calls: bool = True
    must_call: bool = False
    one_call: bool = False
    names: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """An answer in words of which `answer` is the JSON schema, or with calls, or either.

    Without `answer` the words are any, or none if it `must_call`. `calls` has, by the names of the
    tools that may be called, the JSON schema of their arguments.
    """

    asked: Asked
    answer: Schema | None = None
    calls: Mapping[str, Schema] = field(default_factory=dict)
    must_call: bool = False
    one_call: bool = False


def demand_of(
    tools: Sequence[Mapping[str, Any]],
    choice: Choice,
    *,
    strict: Mapping[str, Asked],
    one_call: Asked | None,
    answer: tuple[Asked, Schema] | None,
) -> Demand | None:
    """None if the policy may say what it likes.

    `strict` has the tools whose arguments keep to their schema, by name. Raises ApiError for a tool
    that is not there, and for a schema that is none, or has what no grammar keeps to.
    """
    schemas = {
        tool["function"]["name"]: tool["function"].get("parameters") or ANY_OBJECT for tool in tools
    }
    if unknown := [name for name in choice.names or () if name not in schemas]:
        raise refused(
            choice.asked.field, choice.asked.value,
            f"no tool has the name {unknown[0]!r}: name one of tools",
        )  # fmt: skip
    if choice.must_call and not schemas:
        raise refused(
            choice.asked.field,
            choice.asked.value,
            f"there are no tools: send tools, or {LEAVE_OUT}",
        )
    allowed: Collection[str] = ()
    if choice.calls:
        allowed = schemas if choice.names is None else choice.names
    kept = [strict[name] for name in allowed if name in strict]
    asked = [
        *([choice.asked] if choice.must_call or choice.names is not None else ()),
        *([answer[0]] if answer is not None else ()),
        *kept,
        *([one_call] if one_call is not None and allowed else ()),
    ]
    if not asked:
        return None
    for name in allowed:
        if name in strict:
            _check(strict[name], schemas[name])
    if answer is not None:
        _check(*answer)
    return Demand(
        asked=asked[0],
        answer=None if answer is None else answer[1],
        calls={
            name: schemas[name] if name in strict or choice.must_call else ANY_OBJECT
            for name in allowed
        },
        must_call=choice.must_call,
        one_call=one_call is not None or choice.one_call,
    )


def _check(asked: Asked, schema: Schema) -> None:
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        where = error.json_path.removeprefix("$.")
        raise refused(
            asked.field, asked.value, f"the schema is none: {where}: {error.message}"
        ) from error
    if (keyword := _not_kept(schema)) is not None:
        raise refused(
            asked.field, asked.value,
            f"{keyword!r} in the schema is nothing that a grammar can keep to: leave that out, or "
            f"{LEAVE_OUT}",
        )  # fmt: skip


def _not_kept(schema: Any) -> str | None:
    """A keyword that would be overlooked."""
    if isinstance(schema, list):
        return next(filter(None, map(_not_kept, schema)), None)
    if not isinstance(schema, Mapping):
        return None
    for keyword, value in schema.items():
        if keyword in _NOT_KEPT or (keyword == "allOf" and len(value) > 1):
            return str(keyword)
        if keyword in _DATA:
            continue
        inner = list(value.values()) if keyword in _NAMED else value
        if (found := _not_kept(inner)) is not None:
            return found
    return None
