"""What all parts of a configuration share."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Nothing unknown, nothing changed later, no number that is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        wanted = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and wanted in (int, float):
            raise ValueError("must be a number")
        return value


def _split(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    return [name for name in value.split(",") if name] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""A list, or one string with commas between its names."""

Numbers = Annotated[tuple[int, ...], BeforeValidator(_split)]
"""Likewise of whole numbers; one alone needs no list."""
