"""Settings of the rollout: which episodes begin, and what becomes of them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

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
    expert: ExpertConfig = ExpertConfig()
