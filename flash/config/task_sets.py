"""Settings of several task sets in one run, and what each of them has of a batch."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Self

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from flash.config.agent import AgentConfig
from flash.config.names import BARE
from flash.environments.config import EnvConfig
from flash.reward.config import AnyReward, EnvReward
from flash.rollout.config import FilterNames
from flash.section import Section


class _OnlyGiven(Section):
    """Is written as it was given: what is not in it is the run's."""

    @model_serializer(mode="wrap")
    def _given(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = write(self)
        return {name: value for name, value in written.items() if name in self.model_fields_set}


class AgentOfSet(_OnlyGiven, AgentConfig):
    """What of the run's agent is otherwise."""


class PlayedWith(_OnlyGiven):
    """What the tasks of a set are played with; what is not given is as in the run."""

    env: EnvConfig | None = Field(None, description="in the place of the run's, all of it")
    agent: AgentOfSet = Field(AgentOfSet(), description="what of the run's agent is otherwise")
    reward: AnyReward = Field(
        EnvReward(), description="in the place of the run's, all of it", validate_default=False
    )

    @field_validator("env", "reward", mode="before")
    @classmethod
    def _section_by_its_bare_value(cls, value: Any, info: ValidationInfo) -> Any:
        return {BARE[info.field_name or ""]: value} if isinstance(value, str) else value

    def has(self, name: str) -> bool:
        """Whether that field was given."""
        return name in self.model_fields_set and getattr(self, name) is not None


class TaskSetConfig(PlayedWith):
    """Tasks of one kind; what is not given is as in the run."""

    weight: float = Field(
        1.0, gt=0, description="of the samples of a batch, beside the other sets' weights"
    )
    group_size: int | None = Field(None, ge=1, description="in the place of the run's")
    filters: FilterNames = Field((), description="in the place of rollout.filters")
    brought: bool = Field(
        False, description="explorers bring env, agent and reward of it: flash explore --tasks"
    )

    @model_validator(mode="after")
    def _what_is_brought_is_not_here(self) -> Self:
        for field in PlayedWith.model_fields:
            if self.brought and self.has(field):
                raise ValueError(
                    f"brought=true with {field}: explorers bring that (flash explore --tasks): "
                    f"leave {field} out, or brought"
                )
        return self


def groups_of_sets(
    batch_size: int, weights: Mapping[str, float], sizes: Mapping[str, int]
) -> dict[str, int]:
    """How many groups of each set are in a batch of so many samples, by the sets' weights and the
    sizes of their groups. ValueError if that is no whole number of each."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    of_one = {name: weight / total / sizes[name] for name, weight in exact.items()}
    for name, share in of_one.items():
        groups = batch_size * share
        if groups.denominator > 1:
            step = math.lcm(*(part.denominator for part in of_one.values()))
            below = batch_size - batch_size % step
            fits = f"{below} or {below + step}" if below else f"{step}"
            raise ValueError(
                f"task_sets.{name}.weight={weights[name]:g} of {float(total):g} is "
                f"{float(groups):.4g} groups of {sizes[name]} in batch_size={batch_size}, and must "
                f"be a whole number: use a batch_size of {fits}, or other weights"
            )
    return {name: int(batch_size * share) for name, share in of_one.items()}
