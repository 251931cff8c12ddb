"""The settings of each kind of advantages, found by name; imports no torch.

trainer:
  advantages: {name: gigpo, gamma: 0.95}     # or just: gigpo
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from flash.section import Section


class AdvantageSettings(Section):
    """What the settings of all kinds have."""

    name: Any
    whiten: bool = Field(False, description="to mean 0, deviation 1 over the batch's tokens")
    clip: float | None = Field(None, gt=0, description="to this size, after whitening; null: not")

    @property
    def compares(self) -> bool:
        """Whether the episodes of a group are compared, so that it takes two."""
        return True

    @property
    def of_turns(self) -> bool:
        """Whether they take the rewards of an episode's turns."""
        return False

    @property
    def whitens(self) -> bool:
        return self.whiten

    @property
    def needs_batch(self) -> bool:
        """Whether an advantage depends on other groups of the batch."""
        return self.whitens

    def parameters(self) -> dict[str, Any]:
        """The keyword arguments of the function."""
        return self.model_dump(exclude={"name", "whiten", "clip"})


class Grpo(AdvantageSettings):
    """Rewards against the group's mean, by its deviation."""

    name: Literal["grpo"] = "grpo"
    std: bool = Field(True, description="divide by the standard deviation of the group")


class DrGrpo(AdvantageSettings):
    """Rewards against the group's mean."""

    name: Literal["dr_grpo"] = "dr_grpo"


class Rloo(AdvantageSettings):
    """Rewards against the mean of the others."""

    name: Literal["rloo"] = "rloo"


class Reinforce(AdvantageSettings):
    """Rewards against a baseline."""

    name: Literal["reinforce"] = "reinforce"
    baseline: Literal["batch", "group", "none"] = Field(
        "batch", description="whose mean reward is taken from a reward"
    )

    @property
    def compares(self) -> bool:
        return self.baseline == "group"

    @property
    def needs_batch(self) -> bool:
        return self.whitens or self.baseline == "batch"


class ReinforcePp(AdvantageSettings):
    """REINFORCE++: rewards, whitened over the batch."""

    name: Literal["reinforce_pp"] = "reinforce_pp"
    baseline: Literal["batch", "group", "none"] = Field(
        "none", description="whose mean reward is taken from a reward before whitening"
    )

    @property
    def compares(self) -> bool:
        return self.baseline == "group"

    @property
    def whitens(self) -> bool:
        return True


class TurnReturns(AdvantageSettings):
    """Discounted returns of turns against the group's."""

    name: Literal["turn_returns"] = "turn_returns"
    gamma: float = Field(0.95, ge=0, le=1, description="discount of a reward, a turn")
    std: bool = Field(True, description="divide by the standard deviation of the group")

    @property
    def of_turns(self) -> bool:
        return True


class GiGpo(AdvantageSettings):
    """Episodes against the group, and turns against those in the same state."""

    name: Literal["gigpo"] = "gigpo"
    gamma: float = Field(0.95, ge=0, le=1, description="discount of a reward, a turn")
    omega: float = Field(1.0, ge=0, description="weight of the comparison of turns")
    std: bool = Field(True, description="divide by the standard deviation of the group")

    @property
    def of_turns(self) -> bool:
        return True


class Gae(AdvantageSettings):
    """Generalised advantage estimation, token by token, with a critic (trainer.critic)."""

    name: Literal["gae"] = "gae"
    gamma: float = Field(1.0, ge=0, le=1, description="discount of a reward, a token")
    lam: float = Field(
        1.0, ge=0, le=1, description="λ: 1 trusts what followed, 0 the critic's next value"
    )
    whiten: bool = Field(
        True, description="to mean 0, deviation 1 over the batch's tokens; on by default"
    )

    @property
    def compares(self) -> bool:
        return False

    @property
    def needs_batch(self) -> bool:
        return True  # the critic learns from all of it


AnyAdvantages = Annotated[
    Grpo | DrGrpo | Rloo | Reinforce | ReinforcePp | TurnReturns | GiGpo | Gae,
    Field(discriminator="name"),
]
