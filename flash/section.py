"""What all parts of a configuration share."""

from collections.abc import Mapping
from typing import Annotated, Any, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
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


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""A list, or one string with commas between its names."""

Numbers = Annotated[tuple[int, ...], BeforeValidator(_split)]
"""Likewise of whole numbers; one alone needs no list."""


def is_url(value: object) -> bool:
    """Whether it is a text that names a host, and a port that can be, by HTTP."""
    try:
        url = urlsplit(value if isinstance(value, str) else "")
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port above 65535, a bracket left open
        return False
