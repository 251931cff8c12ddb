"""The policy: a model that exists, or a small one made and taught on the spot."""

import re
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from flash.section import Section

SMALL = "small"


class PolicyConfig(Section):
    """The policy that `model=small` makes from the environment's vocabulary."""

    layers: int = Field(3, ge=1, description="transformer layers")
    hidden_size: int = Field(128, ge=2, description="width; a multiple of 2 × heads")
    heads: int = Field(4, ge=1, description="attention heads")
    max_tokens: int = Field(4096, ge=16, description="longest sequence it can read")

    @model_validator(mode="after")
    def _heads_are_even(self) -> Self:
        step = 2 * self.heads
        if self.hidden_size % step:
            below = self.hidden_size - self.hidden_size % step
            raise ValueError(
                f"policy.hidden_size={self.hidden_size} is no multiple of 2 × policy.heads = "
                f"{step}: use {below or step} or {below + step}"
            )
        return self


class WarmStartConfig(Section):
    """Supervised learning from the environment's expert, for `model=small`; kept for later runs."""

    steps: int = Field(0, ge=0, description="optimizer steps; 0: no warm start")
    demonstrations: int = Field(1000, ge=1, description="expert episodes")
    batch_tokens: int = Field(4096, ge=1, description="tokens in a step")
    learning_rate: float = Field(2e-3, gt=0, description="of AdamW, after the warm-up")
    observation_weight: float = Field(
        0.5, ge=0, description="of an observation's tokens in the loss"
    )


def check_model(model: str) -> None:
    """ValueError if it is neither a hub name nor a directory that holds a model."""
    path = Path(model).expanduser()
    if _is_hub_name(model):
        return
    if not model or not path.is_dir():
        raise ValueError("there is no such directory; a hub name has the form org/model")
    if not (path / "config.json").is_file():
        raise ValueError(
            "the directory holds no config.json, so no model; that of a checkpoint is in its "
            "model/ folder"
        )


def _is_hub_name(model: str) -> bool:
    """Whether it can't be meant as a path: `name` or `org/name`, and no directory of that name."""
    parts = model.split("/")
    return (
        len(parts) <= 2
        and all(re.fullmatch(r"\w[\w.-]*", part) for part in parts)
        and not Path(parts[0]).is_dir()
    )
