"""A run: fields and sections that fit together."""

from typing import Self

from pydantic import model_validator

from flash.config.fields import RunFields
from flash.config.together import check_together


class Config(RunFields):
    """A run."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_together(self)
        return self
