"""Settings of the small policy and of its warm start."""

from typing import Self

from pydantic import Field, model_validator

from flash.section import Section


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
                f"policy.hidden_size={self.hidden_size} is not a multiple of 2 × policy.heads = "
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
