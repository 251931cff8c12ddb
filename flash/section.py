"""What all parts of a configuration share."""

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    PlainSerializer,
    SecretStr,
    model_validator,
)
from pydantic_core import PydanticCustomError

BOOL_FOR_NUMBER = "bool_for_number"  # the type of an error, which names `field` and `value`


class Section(BaseModel):
    """Nothing unknown, nothing changed later, no number that is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Of the whole, because a field that tells variants from each other may have no validator.
    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, given: Any) -> Any:
        for field, value in given.items() if isinstance(given, Mapping) else ():
            if isinstance(value, bool) and field in cls.model_fields:
                wanted = cls.model_fields[field].annotation
                if {int, float} & {wanted, *get_args(wanted)}:
                    told = {"field": field, "value": value}
                    raise PydanticCustomError(BOOL_FOR_NUMBER, "must be a number", told)
        return given


def _split(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    return [name for name in value.split(",") if name] if isinstance(value, str) else value


_NOT_KEPT = "(not kept)"


def _given(value: Any) -> Any:
    if value == _NOT_KEPT:
        raise ValueError(
            "a run's folder keeps no keys: give it again, or name an environment variable that "
            "holds it, $NAME, which is kept by its name"
        )
    if isinstance(value, str) and value.startswith("$") and not os.environ.get(value[1:]):
        raise ValueError(f"there is no environment variable {value[1:]}: export it, in this shell")
    return value


def _kept(secret: SecretStr) -> str:
    value = secret.get_secret_value()
    return value if value.startswith("$") or not value else _NOT_KEPT


def revealed(secret: SecretStr) -> str:
    """The key itself, of an environment variable if it is named."""
    value = secret.get_secret_value()
    return os.environ[value[1:]] if value.startswith("$") else value


Secret = Annotated[SecretStr, BeforeValidator(_given), PlainSerializer(_kept, return_type=str)]
"""A key, or $NAME for one in the environment; what is written of it is the name alone."""

Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""A list, or one string with commas between its names."""


def can_be_had(value: tuple[str, ...]) -> tuple[str, ...]:
    """Environment variables, if they are; ValueError for one that is not set here."""
    for name, given, _ in (entry.partition("=") for entry in value):
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ValueError(f"{name!r} is no name of a variable: write NAME or NAME=value")
        if not given and name not in os.environ:
            raise ValueError(f"{name} is not set here: export it, or write {name}=value")
    return value


Variables = Annotated[Names, AfterValidator(can_be_had)]
"""Environment variables: NAME passes this process's own, NAME=value sets one."""


def _named(value: Any) -> Any:
    names = _split(value)
    if not isinstance(names, list | tuple):
        return names
    return [int(name) if isinstance(name, str) and name.isdigit() else name for name in names]


def _gpu(value: Any) -> Any:
    if isinstance(value, str) and not value.startswith(("GPU-", "MIG-")):
        raise ValueError("must be a GPU's number, or its UUID as in GPU-8932f937")
    return value


_Gpu = Annotated[int | str, BeforeValidator(_gpu)]
GpuNames = Annotated[tuple[_Gpu, ...], BeforeValidator(_named)]
"""Likewise of GPUs, by numbers or UUIDs; one alone needs no list."""


def is_url(value: object) -> bool:
    """Whether it is a text that names a host, and a port that can be, by HTTP."""
    try:
        url = urlsplit(value if isinstance(value, str) else "")
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port above 65535, a bracket left open
        return False
