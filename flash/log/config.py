"""Settings of the durable log."""

from typing import Any

from pydantic import Field, SecretStr, field_validator

from flash.section import Secret, Section


class LogConfig(Section):
    """What happens is written down before it counts."""

    url: Secret = Field(
        SecretStr(""),
        description="of PostgreSQL, postgresql://user@host/database, or $NAME of a variable that "
        "holds it; by default the run's folder has an SQLite file",
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
