"""Settings of a cluster; imports no ray."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from flash.section import Section


class ClusterTrainerConfig(Section):
    """What the trainer's ranks get of nodes; the controller is on the first of these."""

    nodes: int = Field(1, ge=1, description="nodes that have ranks, as many each")
    gpus: int = Field(0, ge=0, description="GPUs of each of them, one for each rank")
    cpus: int = Field(1, ge=1, description="cores of each of them")


class ClusterExplorersConfig(Section):
    """How many explorers play, and what each of them gets of a node."""

    min: int = Field(
        1, ge=0, description="explorers that the cluster must have room for before a run starts"
    )
    max: int | None = Field(
        None,
        ge=1,
        description="explorers that there may be: nodes that join later are used up to it; null: "
        "as many as min",
    )
    gpus: int = Field(0, ge=0, description="GPUs of an explorer, for its engine.workers")
    cpus: int = Field(1, ge=1, description="cores of an explorer")

    @property
    def most(self) -> int:
        return max(self.min, 1) if self.max is None else self.max

    @model_validator(mode="after")
    def _max_is_not_below_min(self) -> Self:
        if self.max is not None and self.max < self.min:
            raise ValueError(
                f"cluster.explorers.max={self.max} is less than cluster.explorers.min={self.min}: "
                f"raise it, or lower the latter"
            )
        return self


class ClusterHostsConfig(Section):
    """What environment hosts and reward processes get, which explorers have."""

    cpus: int = Field(
        0,
        ge=0,
        description="cores that each environment host and reward process asks of any node; 0: they "
        "are on their explorer's node, within its cores",
    )


class ClusterConfig(Section):
    """Where a run's processes are placed; `--cluster KIND` sets the kind alone."""

    kind: Literal["none", "ray"] = Field(
        "none",
        description="none: all on this machine; ray: the controller and explorers wherever a Ray "
        "cluster has room",
    )
    address: str = Field(
        "",
        description="host:port of the cluster's head; by default $RAY_ADDRESS, the cluster that "
        "this machine is in, or else a new one of this machine alone",
    )
    trainer: ClusterTrainerConfig = ClusterTrainerConfig()
    explorers: ClusterExplorersConfig = ClusterExplorersConfig()
    hosts: ClusterHostsConfig = ClusterHostsConfig()

    @field_validator("address")
    @classmethod
    def _address_is_a_host_and_a_port(cls, value: str) -> str:
        if value and not re.fullmatch(r"[\w.-]+:\d{1,5}|\[[\da-fA-F:]+\]:\d{1,5}", value):
            raise ValueError("must be host:port of the cluster's head, as `ray status` tells it")
        return value
