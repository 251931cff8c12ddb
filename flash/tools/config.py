"""Settings of MCP servers."""

import re
import shutil
from collections.abc import Mapping
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from flash.section import Names, Secret, Section, Variables, is_url, revealed

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.1


class McpConfig(Section):
    """An MCP server, as a command that speaks over its standard streams, or by its URL."""

    command: tuple[str, ...] = Field((), description="what starts it: [python, server.py]")
    env: Variables = Field(
        (), description="environment variables of the command, beside PATH, HOME and the like"
    )
    url: str = Field("", description="of one that runs already, by streamable HTTP")
    api_key: Secret = Field(
        SecretStr(""), description="bearer token of that URL, or $NAME of a variable"
    )
    headers: dict[str, Secret] = Field(
        {}, description="of requests to that URL; a value may be $NAME of a variable"
    )
    tools: Names = Field((), description="those of its tools that are offered; none: all")
    each: Literal["run", "episode"] = Field(
        "run",
        description="one for all episodes, or for each its own, where they must not meet",
    )
    at_once: int = Field(
        16, ge=1, description="with each: episode, so many at a time; more episodes wait for one"
    )

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Self:
        if bool(self.command) == bool(self.url):
            raise ValueError("give a command or a url, and not both")
        if self.url and not is_url(self.url):
            raise ValueError(f"url={self.url!r} is no http:// or https:// address")
        if self.url and self.env:
            raise ValueError("env is for a command: leave it out")
        if urlsplit(self.url).username is not None:
            raise ValueError("url holds a user's name, and is told in logs: give it as headers")
        if self.command and (self.headers or self.api_key.get_secret_value()):
            raise ValueError("api_key and headers are for a url: give a command its env")
        if self.api_key.get_secret_value() and "authorization" in map(str.lower, self.headers):
            raise ValueError("api_key is the header Authorization: leave one out")
        for name, value in self.sent().items():
            if not _HEADER_NAME.fullmatch(name):
                raise ValueError(f"headers: {name!r} is no name of a header")
            if not (value.isascii() and value.isprintable()):
                raise ValueError(
                    f"the header {name} must be printable ASCII, on one line: look for a line's "
                    f"end in it"
                )
        if self.command and shutil.which(self.command[0]) is None:
            raise ValueError(
                f"command={list(self.command)}: the command {self.command[0]!r} is not "
                f"installed: install it, or give its path"
            )
        return self

    def sent(self) -> Mapping[str, str]:
        """The headers of each request, with their secrets."""
        headers = {name: revealed(value) for name, value in self.headers.items()}
        key = revealed(self.api_key)
        return headers | ({"Authorization": f"Bearer {key}"} if key else {})

    def __str__(self) -> str:
        return self.url or " ".join(self.command)
