"""Settings of MCP servers."""

import shutil
from typing import Literal, Self

from pydantic import Field, model_validator

from flash.section import Names, Section, Variables, is_url


class McpConfig(Section):
    """An MCP server, as a command that speaks over its standard streams, or by its URL."""

    command: tuple[str, ...] = Field((), description="what starts it: [python, server.py]")
    env: Variables = Field(
        (), description="environment variables of the command, beside PATH, HOME and the like"
    )
    url: str = Field("", description="of one that runs already, by streamable HTTP")
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
        if self.command and shutil.which(self.command[0]) is None:
            raise ValueError(
                f"command={list(self.command)}: the command {self.command[0]!r} is not "
                f"installed: install it, or give its path"
            )
        return self

    def __str__(self) -> str:
        return self.url or " ".join(self.command)
