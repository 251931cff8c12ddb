"""Settings of the durable log."""

import re

from pydantic import Field, SecretStr, field_validator

from flash.section import Secret, Section

ALL = "all"
TRAINED = "trained"
_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12}


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
    keep: str = Field(
        ALL,
        description="what stays in it: all; trained: of episodes that were not trained how they "
        "ended, without tokens and texts; a size, as 20 GB: what no resume needs goes, oldest "
        "first, where it would be larger",
    )

    @field_validator("keep", mode="before")
    @classmethod
    def _is_known(cls, value: object) -> str:
        if isinstance(value, str) and value in (ALL, TRAINED):
            return value
        if not isinstance(value, str) or not bytes_of(value):
            raise ValueError(
                "must be all, trained, or a size with its unit, MB, GB or TB, as in 20 GB"
            )
        return value

    @field_validator("url")
    @classmethod
    def _is_of_postgres(cls, value: SecretStr) -> SecretStr:
        url = value.get_secret_value()
        if url and not url.startswith("$"):
            check_url(url)
        return value


def bytes_of(size: str) -> int:
    """What a size such as 20 GB comes to; 0 if it is none."""
    read = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?(MB|GB|TB)", size.strip(), re.IGNORECASE)
    return int(float(read[1]) * _UNITS[read[2].upper()]) if read else 0


def check_url(url: str) -> None:
    """ValueError for one that is not of PostgreSQL, or can't be read as it was meant."""
    if not url.startswith(("postgresql://", "postgres://")):
        raise ValueError(
            f"log.url={shown(url)!r}: must be a URL of PostgreSQL, "
            f"postgresql://user@host/database; left out, the run's folder has an SQLite file"
        )
    user, at, rest = url.partition("://")[2].partition("?")[0].partition("@")
    if at and ("/" in user or "@" in rest):
        raise ValueError(
            f"log.url={shown(url)!r}: it can't be told where its password ends: write an @ in it "
            f"as %40 and a / as %2F"
        )


def shown(url: str) -> str:
    """Without its password."""
    if url.startswith("sqlite:///"):
        return url.removeprefix("sqlite:///")
    url = re.sub(r"(?<=[?&]password=)[^&]*", "…", url)
    return re.sub(r"^(\w+:/*)?.*@", lambda found: f"{found[1] or ''}…@", url)
