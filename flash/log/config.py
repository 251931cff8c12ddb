"""Settings of the durable log."""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, Field, SecretStr, field_validator

from flash.section import Secret, Section

_KEEP = r"all|trained|\d+(\.\d+)? ?GB"


def _one_of_them(value: str) -> str:
    if not re.fullmatch(_KEEP, value):
        raise ValueError("must be all, trained, or a size like '20 GB'")
    return value


class LogConfig(Section):
    """What happens is written down before it counts."""

    url: Secret = Field(
        SecretStr(""),
        description="of PostgreSQL, postgresql://user@host/database, or $NAME of a variable that "
        "holds it; by default the run's folder has an SQLite file",
    )
    keep: Annotated[str, AfterValidator(_one_of_them)] = Field(
        "all",
        description="whose tokens and texts stay: all episodes', trained ones', or the newest that "
        "take 'N GB'; what a resume needs stays anyway",
    )
    max_lag_s: float = Field(
        10.0, gt=0, description="of what happened and is not on disk; past it no episode begins"
    )
    timeout_s: float = Field(
        300.0, gt=0, description="while it can't be written; past it the run ends, to be resumed"
    )

    @field_validator("url")
    @classmethod
    def _is_of_postgres(cls, value: SecretStr) -> SecretStr:
        url: Any = value.get_secret_value()
        if url and not url.startswith(("$", "postgresql://", "postgres://")):
            raise ValueError(
                "must be a URL of PostgreSQL, postgresql://user@host/database; left out, the run's "
                "folder has an SQLite file"
            )
        return value
