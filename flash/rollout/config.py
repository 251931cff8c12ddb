"""Settings of the rollout: which episodes begin, and what becomes of them."""

import inspect
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from flash import registry
from flash.section import Names, Section


def _that_are_there(names: tuple[str, ...]) -> tuple[str, ...]:
    if names:
        from flash.rollout.filters import find_filter  # noqa: PLC0415  (imports NumPy)

        for name in names:
            find_filter(name)
    return names


OnStale = Literal["regenerate", "wait", "drop"]
OnStall = Literal["stop", "replace", "restart"]
Schedule = Literal["queue", "batch"]
FilterNames = Annotated[Names, AfterValidator(_that_are_there)]


class AdaptiveAlphaConfig(Section):
    """Follows staleness with less room for it than alpha allows; on if a threshold is given."""

    min_ess: float | None = Field(
        None, gt=0, lt=1, description="the α in force falls if importance/ess is below, say 0.9"
    )
    max_kl: float | None = Field(
        None, gt=0, description="or if kl_behaviour is above, in nats a token, say 0.05"
    )
    max_wait: float = Field(
        0.1, ge=0, lt=1, description="it rises again if idle/trainer is above, and no threshold is"
    )
    window: int = Field(3, ge=1, description="so many steps are judged by their means")

    @property
    def is_on(self) -> bool:
        return self.min_ess is not None or self.max_kl is not None


class LinearDecay(Section):
    """New ones first, and each use makes older; as in Trinity-RFT."""

    name: Literal["linear_decay"] = "linear_decay"
    decay: float = Field(2.0, ge=0, description="versions that each use makes a group older by")


class AgeDecay(Section):
    """Groups of unequal rewards first, while they are new. Ma et al. 2026 (FreshPER)."""

    name: Literal["age_decay"] = "age_decay"
    tau: float = Field(1.0, gt=0, description="versions in which a priority falls to 1/e")


class FunctionPriority(Section):
    """A priority of your own."""

    name: Literal["function"] = "function"
    run: str = Field(description="module:name, a function of a TrainedGroup that gives a number")

    @model_validator(mode="after")
    def _is_a_function(self) -> Self:
        found = registry.function(self.run, "rollout.reuse.priority.run", of="a TrainedGroup")
        if inspect.iscoroutinefunction(found):
            raise ValueError(
                f"rollout.reuse.priority.run={self.run!r} is a coroutine function, and its answer "
                f"is not waited for: write def"
            )
        return self


AnyPriority = Annotated[LinearDecay | AgeDecay | FunctionPriority, Field(discriminator="name")]


class ReuseConfig(Section):
    """Trains groups again, within alpha, where a batch would wait; on if uses is 2 or more."""

    uses: int = Field(1, ge=1, description="batches that a group is in at most; 1: off")
    share: float = Field(
        0.5, gt=0, lt=1, description="of a batch's groups, that may have been trained before"
    )
    priority: AnyPriority = Field(
        LinearDecay(), description="which of them are trained again first, by name"
    )

    @field_validator("priority", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": "linear_decay", **value} if isinstance(value, dict) else value

    @property
    def is_on(self) -> bool:
        return self.uses > 1

    def groups(self, groups_per_batch: int) -> int:
        """How many of a batch may have been trained before."""
        return math.floor(self.share * groups_per_batch + 1e-9) if self.is_on else 0

    def check(self, *, alpha: float, groups_per_batch: int) -> None:
        """ValueError if no group, or none so often, could be trained again."""
        if not self.is_on:
            return
        if self.uses - 1 > alpha:
            most = math.floor(alpha) + 1
            raise ValueError(
                f"rollout.reuse.uses={self.uses} with alpha={alpha:g}: no token is within alpha "
                f"for more than {most} batch{'es' if most > 1 else ''}: set alpha to "
                f"{self.uses - 1} or more, or uses to {most}{' (off)' if most == 1 else ''}"
            )
        if not self.groups(groups_per_batch):
            raise ValueError(
                f"rollout.reuse.share={self.share:g} of the {groups_per_batch} "
                f"group{'s' if groups_per_batch > 1 else ''} in a batch is none: raise it, or "
                f"batch_size"
            )


class ExpertConfig(Section):
    """What others wrote, imitated beside the policy's own samples; on if a file is given."""

    file: Path | None = Field(
        None,
        description="trajectories, JSON lines or Parquet: rows of flash export, or `messages`",
    )
    episodes: int = Field(
        8, ge=1, description="of the file in each batch, beside its batch_size own ones"
    )
    weight: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="μ in the loss: (1 - μ) · the policy's own + μ · -log π of the expert's words",
    )


class RolloutSettings(Section):
    """Which episodes begin, and what becomes of those that fail, grow old or teach nothing."""

    schedule: Schedule = Field(
        "queue",
        description="queue: an episode begins the moment there is room; batch: a batch's begin "
        "together, the next batch's when the last of them has ended",
    )
    replicate: bool = Field(
        True,
        description="a group's first responses may come from different workers; false: from one",
    )
    redundant_groups: int = Field(
        0, ge=0, description="groups begun beyond what batches can take; the slowest are cancelled"
    )
    redundant_episodes: int = Field(
        0, ge=0, description="episodes begun beyond group_size; the slowest are cancelled"
    )
    filters: FilterNames = Field(
        (),
        description="what drops a complete group, for another task's: equal_rewards, or "
        "module:function; with commas between",
    )
    max_filtered: int = Field(
        10, ge=1, description="batches' worth of groups that filters may drop for one batch"
    )

    on_stale: OnStale = Field(
        "regenerate", description="what becomes of an episode that would pass alpha"
    )
    max_attempts: int = Field(
        3, ge=1, description="failures of an episode before its group is given up"
    )
    max_regenerations: int = Field(
        8,
        ge=0,
        description="how often a group is set back by staleness before another task replaces it",
    )
    stall_timeout_s: float = Field(
        600.0, gt=0, description="without any progress, until the watchdog says why and acts"
    )
    on_stall: OnStall = Field(
        "stop",
        description="about what blocks: end the run (exit code 3), replace its episodes, or start "
        "its worker anew; what neither can help ends the run",
    )
    adaptive_alpha: AdaptiveAlphaConfig = AdaptiveAlphaConfig()
    reuse: ReuseConfig = ReuseConfig()
    expert: ExpertConfig = ExpertConfig()
