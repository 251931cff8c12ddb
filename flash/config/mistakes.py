"""Nested plain values become a model, or each mistake in them a line with its remedy."""

import difflib
import reprlib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from flash.config.listing import fields, variants
from flash.config.names import ALIASES
from flash.config.run import Config
from flash.config.task_sets import TaskSetConfig
from flash.section import BOOL_FOR_NUMBER

_M = TypeVar("_M", bound=BaseModel)

_SHOWN = reprlib.Repr()  # a value may be as long as a file
_SHOWN.maxstring = _SHOWN.maxother = 200
# What pydantic says in words of its own.
_REMEDIES = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a text; write it in quotes",
    "dict_type": "must be a mapping: {key: value}",
    "path_type": "must be a path; write it in quotes",
    "tuple_type": "must be a list: [one, two]",
    "model_attributes_type": "must be a name, or a section with a name",
    "too_short": "name at least one",
}


def validated(model: type[_M], settings: Mapping[str, Any]) -> _M:
    """The model of nested plain values. ValueError with a line for each mistake."""
    try:
        return model.model_validate(settings)
    except ValidationError as errors:
        lines = [_mistake(error, model) for error in errors.errors()]
        raise ValueError("\n".join(lines)) from None


def _mistake(error: Any, model: type[BaseModel]) -> str:
    """One mistake in one line; of a task set as of a model of its own."""
    section, *inside = error["loc"] or ("",)
    if model is not Config or section != "task_sets" or len(inside) < 2:
        return _line(error, model)
    name, *field = inside
    return f"task_sets.{name}.{_line({**error, 'loc': tuple(field)}, TaskSetConfig)}"


def _line(error: Any, model: type[BaseModel]) -> str:
    name, variant = _name_and_variant(error["loc"], model)
    given = error["input"]
    if error["type"] == BOOL_FOR_NUMBER:
        name, given = f"{name}.{error['ctx']['field']}".removeprefix("."), error["ctx"]["value"]
    if error["type"] in ("extra_forbidden", "invalid_key"):
        # The location and input of an invalid key say nothing of its place.
        hint = "; fields are texts"
        if error["type"] == "extra_forbidden":
            hint = _nearest(name, variant, model)
            if any("." in str(part) for part in error["loc"]):
                hint = "; in a file a section's fields are nested: section, colon, then the field"
        return f"{name}: unknown field{hint}"
    if error["type"] in ("union_tag_invalid", "union_tag_not_found"):
        return _choice(name, error.get("ctx", {}).get("tag"), model)
    if error["type"] == "missing":
        about = next((info.description for known, info in fields(model) if known == name), None)
        return f"{name} is missing: give it a value" + (f" ({about})" if about else "")
    if error["type"] == "model_type":
        return f"{name}={_SHOWN.repr(given)}: must be a section; write --{name}.field value"
    message = _REMEDIES.get(error["type"], str(error["msg"]))
    message = message.removeprefix("Value error, ").replace("Input should", "must")
    message = message.replace("be greater than or equal to", "be at least")
    message = message.replace("be less than or equal to", "be at most")
    # Some errors name their fields themselves, as those of a whole section do.
    section = isinstance(given, dict) and error["type"] == "value_error"
    if message.startswith(name) or (section and name in message):
        return message
    return f"{name}: {message}" if section else f"{name}={_SHOWN.repr(given)}: {message}"


def _choice(name: str, given: str | None, model: type[BaseModel]) -> str:
    """What a section with variants may be called."""
    known = variants(dict(fields(model))[name])
    near = difflib.get_close_matches(given or "", known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
    return f"{name}.name is missing: {hint}" if given is None else f"{name}.name={given!r}: {hint}"


def _name_and_variant(
    location: tuple[str | int, ...], model: type[BaseModel]
) -> tuple[str, str | None]:
    """The dotted name of a field, and in a section with variants which of them was chosen."""
    with_variants = [name for name, info in fields(model) if info.discriminator is not None]
    parts = [str(part) for part in location]
    for end in range(1, len(parts)):
        if ".".join(parts[:end]) in with_variants:
            return ".".join(parts[:end] + parts[end + 1 :]), parts[end]
    return ".".join(parts), None


def _nearest(name: str, variant: str | None, model: type[BaseModel]) -> str:
    """What an unknown key may have meant, or whose it is."""
    if variant is not None:
        section, _, key = name.rpartition(".")
        kinds = variants(dict(fields(model))[section])
        own = [field for field in kinds[variant].model_fields if field != "name"]
        near = difflib.get_close_matches(key, own, n=1, cutoff=0.6)
        owners = [kind for kind, other in kinds.items() if key in other.model_fields]
        of_others = (
            f" ({', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it)" if owners else ""
        )
        has = f"did you mean {near[0]}?" if near else f"{variant} has {', '.join(own) or 'none'}"
        return f" of {variant}{of_others}; {has}"
    return f"; {_meant(name, model)}"


def _meant(name: str, model: type[BaseModel]) -> str:
    known = [field for field, _ in fields(model)] + (list(ALIASES) if model is Config else [])
    section, _, key = name.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    keys = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    initials = [k for k in siblings if "_" in k and key == "".join(w[:1] for w in k.split("_"))]
    near = [siblings[k] for k in initials or keys]
    near = near or [k for k in known if k.rpartition(".")[2] == key]
    if near:
        return f"did you mean {near[0]}?"
    if section and siblings:
        return f"{section} has {', '.join(siblings)}"
    return "see flash train --help" if model is Config else f"use {', '.join(model.model_fields)}"
