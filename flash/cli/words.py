"""Words of the command line: plain ones, fields with their values, lists of values."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, SecretStr

from flash import config as configuration
from flash.config.yaml_text import plain_values


def split_words(
    arguments: Sequence[str],
    model: type[BaseModel] = configuration.Config,
    options: Sequence[str] = (),
) -> tuple[list[str], dict[str, Any]]:
    """The plain words, and the fields: `--field.sub value`, `--field.sub=value`, `--switch`.

    Values are YAML, except where the field is a text, or names with commas between. `options` are
    the command's own, which are known already: what is like one of them, and like no field, was
    meant as one.
    """
    kinds = {name: info.annotation for name, info in configuration.fields(model)}
    plain: list[str] = []
    fields: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            plain.append(word)
            continue
        name, given, value = word[2:].partition("=")
        name = name.replace("-", "_")
        name = "checkpoint.resume" if name == "resume" else name
        if near := "." not in name and name not in kinds and get_close_matches(word, options, n=1):
            raise ValueError(f"{word} is unknown: did you mean {near[0]}?")
        if not given:
            if kinds.get(name) is bool and (not words or words[0].lower() not in _SWITCH):
                value = "true"
            elif not words or words[0].startswith("--"):
                dashes = f", or --{name}='{words[0]}' if that is the value" if words else ""
                raise ValueError(f"--{name} has no value: write --{name} VALUE{dashes}")
            else:
                value = words.pop(0)
        if name in fields:
            raise ValueError(f"--{name} is given twice: give it once")
        # Of names with commas between, "*" would be YAML's sign for something else.
        names = kinds.get(name) == tuple[str, ...] and not value.startswith("[")
        is_text = names or kinds.get(name) in (str, SecretStr)
        fields[name] = value if is_text else plain_values(value, f"--{name} {value!r}")
    return plain, fields


_SWITCH = ("true", "false", "yes", "no", "on", "off")


def only(words: Sequence[str], what: str) -> str | None:
    if len(words) > 1:
        meant = next((f"; did you mean -{w}?" for w in words if w.startswith("-")), "")
        raise ValueError(
            f"{words[1]!r} is one word too many: give {what}, then --field value pairs{meant}"
        )
    return words[0] if words else None


def swept(text: str) -> tuple[str, list[Any]]:
    """The field of `FIELD=V1,V2,…`, and its values."""
    name, _, values = text.partition("=")
    if not name or not values:
        raise ValueError(f"--sweep {text}: write --sweep FIELD=V1,V2,…")
    return name.replace("-", "_"), listed("sweep", values)


def listed(option: str, values: str) -> list[Any]:
    found: list[Any] = plain_values(f"[{values}]", f"--{option} {values!r}")
    return found
