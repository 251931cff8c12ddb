"""Settings of the environment."""

from typing import Any

from pydantic import Field

from flash.section import Section


class EnvConfig(Section):
    """The environment; `--env NAME` sets the name alone."""

    name: str = Field(description="a registered environment, or module:Class")
    options: dict[str, Any] = Field({}, description="its constructor's arguments")
    eval_options: dict[str, Any] = Field(
        {"split": "heldout"}, description="what evaluation changes in them"
    )
    hosts: int = Field(
        0, ge=0, description="processes for environments that block; 0 runs them in the event loop"
    )
