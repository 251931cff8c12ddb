"""Settings of a run's explorers."""

import ipaddress
from pathlib import Path
from typing import Self

from pydantic import Field, SecretStr, field_validator, model_validator

from flash.section import Secret, Section, revealed

_SHORTEST_TOKEN = 16


class ExplorersConfig(Section):
    """Processes that play episodes for the run, on this machine or others: `flash explore`."""

    expected: int = Field(
        0,
        ge=0,
        description="explorers that are to come, more or fewer of which may; nobody waits for "
        "them. 0: none may come",
    )
    host: str = Field(
        "127.0.0.1",
        description="the address at which they come in; 0.0.0.0 for those of other machines",
    )
    port: int = Field(
        0, ge=0, le=65535, description="of that address; 0: a free one, the same after a resume"
    )
    token: Secret = Field(
        SecretStr(""),
        description="what an explorer must know, or $NAME of a variable that holds it; by default "
        "a new one. It is in explorers.json of the run's folder, with the URL",
    )
    lease_s: float = Field(
        30.0,
        gt=0,
        description="an explorer that is not heard of for so long has lost the episodes it plays",
    )
    evaluate: bool = Field(
        False,
        description="evaluations are played beside rollout, by explorers that do nothing else, "
        "which flash explore has an option for",
    )
    certificate: Path | None = Field(
        None,
        description="the controller's, in PEM, for TLS",
    )
    key: Path | None = Field(None, description="the certificate's private key, in PEM")

    @property
    def may_come(self) -> bool:
        return self.expected > 0

    @field_validator("token")
    @classmethod
    def _can_not_be_guessed(cls, value: SecretStr) -> SecretStr:
        """Whoever connects is shown what a guess can be tried out on, as often as they like."""
        if 0 < len(revealed(value)) < _SHORTEST_TOKEN:
            raise ValueError(
                f"must have at least {_SHORTEST_TOKEN} characters, or it could be guessed: leave "
                f"it out for a new one"
            )
        return value

    @field_validator("host")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        if value != "localhost":
            try:
                ipaddress.ip_address(value)
            except ValueError:
                raise ValueError(
                    "must be an address of this machine: 127.0.0.1, 0.0.0.0 for all, or one"
                ) from None
        return value

    @model_validator(mode="after")
    def _evaluators_may_come(self) -> Self:
        if self.evaluate and not self.expected:
            raise ValueError(
                "explorers.evaluate=true with explorers.expected=0: none may come: let them"
            )
        return self

    @model_validator(mode="after")
    def _certificate_has_a_key(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError(
                "explorers.certificate and explorers.key go together: give both, or neither"
            )
        for name in ("certificate", "key"):
            path: Path | None = getattr(self, name)
            if path is not None and not path.is_file():
                raise ValueError(f"explorers.{name}={str(path)!r}: there is no such file")
        return self
