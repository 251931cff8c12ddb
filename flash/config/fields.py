"""A run's own fields, and its sections."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from flash.cluster.config import ClusterConfig
from flash.config.agent import AgentConfig
from flash.config.model import SMALL, check_model
from flash.config.names import BARE, check_names, without_aliases
from flash.config.task_sets import TaskSetConfig, groups_of_sets
from flash.environments.config import EnvConfig
from flash.evaluation.config import EvalConfig
from flash.explorer.config import ExplorersConfig
from flash.hub.config import EngineConfig
from flash.log.config import LogConfig
from flash.reward.config import AnyReward, EnvReward, ProcessReward
from flash.rollout.config import RolloutSettings
from flash.section import Section
from flash.seeds import LARGEST
from flash.trainer.config import TrainerConfig
from flash.warm_start.config import PolicyConfig, WarmStartConfig


class CheckpointConfig(Section):
    """Checkpoints under runs/<name>/checkpoints."""

    every: int = Field(0, ge=0, description="steps between checkpoints that are kept; 0: none")
    minutes: float = Field(
        10.0,
        ge=0,
        description="minutes between spare ones beside those, of which the newest two are kept; "
        "0: none. There is one at the end anyway",
    )
    resume: bool = Field(False, description="go on from the newest checkpoint of this run")


class RunFields(Section):
    """A run."""

    name: str = Field("run", description="the run's folder under runs/")
    env: EnvConfig = Field(description="an environment, for example frozen_lake")
    model: str = Field(SMALL, description=f"{SMALL}, a directory, or a hub name like org/model")
    engine: EngineConfig = EngineConfig()
    alpha: float = Field(
        1.0,
        ge=0,
        description="asynchronous ratio: how many versions old a token may be; 0: synchronous "
        "(also async_generation_ratio)",
    )
    batch_size: int = Field(64, ge=1, description="samples in a step")
    group_size: int = Field(8, ge=1, description="episodes of one task, compared with each other")
    stream: bool = Field(
        False,
        description="compute gradients of groups as they finish; the optimizer step is still the "
        "whole batch's",
    )
    publish_every: int = Field(
        1,
        ge=1,
        description="steps between publishes; alpha still counts versions trained, so it must be "
        "at least one less",
    )
    steps: int = Field(100, ge=1, description="policy versions to train")
    seed: int = Field(
        0, ge=0, le=LARGEST, description="of tasks, sampling and the small policy; below 2**63"
    )
    eval_every: int = Field(10, ge=0, description="steps between evaluations; 0: only at the ends")
    transcripts: int = Field(
        2, ge=0, description="episodes of a step that transcripts.jsonl keeps, for flash show"
    )
    runs_dir: Path = Field(Path("runs"), description="where the runs' folders are")
    agent: AgentConfig = AgentConfig()
    reward: AnyReward = Field(
        EnvReward(), description="env: the environment's own; or a stage after the last turn"
    )
    task_sets: dict[str, TaskSetConfig] = Field(
        {},
        description="several kinds of tasks in one run, NAME: {weight, env, agent, reward, "
        "group_size, filters, brought}; what a set does not say is as in the run",
    )
    rollout: RolloutSettings = RolloutSettings()
    trainer: TrainerConfig = TrainerConfig()
    policy: PolicyConfig = PolicyConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    explorers: ExplorersConfig = ExplorersConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="before")
    @classmethod
    def _one_name_for_each(cls, given: Any) -> Any:
        return without_aliases(given) if isinstance(given, Mapping) else given

    @field_validator("name")
    @classmethod
    def _name_is_one_folder(cls, value: str) -> str:
        if not re.fullmatch(r"\w[\w.-]{,199}", value):
            raise ValueError(
                "must be a folder's name: at most 200 letters, digits, '.', '_' and '-'"
            )
        return value

    @field_validator("env", "engine", "reward", "cluster", mode="before")
    @classmethod
    def _section_by_its_bare_value(cls, value: Any, info: ValidationInfo) -> Any:
        return {BARE[info.field_name or ""]: value} if isinstance(value, str) else value

    @field_validator("model")
    @classmethod
    def _model_is_there(cls, value: str) -> str:
        if value != SMALL:
            check_model(value)
        return value

    @field_validator("task_sets")
    @classmethod
    def _sets_can_be_told_apart(cls, value: dict[str, TaskSetConfig]) -> dict[str, TaskSetConfig]:
        check_names(value, "task_sets: ")
        return value

    @property
    def uses_environment(self) -> bool:
        """An agent of the user's own has a world of its own; but a small policy has a teacher,
        unless servers have a model of theirs."""
        return not self.agent.run or (self.model == SMALL and not self.engine.urls)

    @property
    def brought(self) -> frozenset[str]:
        """The task sets that explorers bring: nothing here plays their tasks."""
        return frozenset(name for name, of_set in self.task_sets.items() if of_set.brought)

    @property
    def own_sets(self) -> Mapping[str, Self]:
        """Those of `sets` whose tasks can be played here."""
        return {name: of_set for name, of_set in self.sets.items() if name not in self.brought}

    @property
    def hosted(self) -> int:
        """How many environment hosts and reward processes there are wherever it is played."""
        return sum(
            (0 if of_set.agent.run else of_set.env.hosts)
            + (of_set.reward.concurrency if isinstance(of_set.reward, ProcessReward) else 0)
            for of_set in self.own_sets.values()
        )

    @property
    def sets(self) -> Mapping[str, Self]:
        """Each task set by its name, as if it were a run of its own with its part of the batch; a
        run without sets is one without a name. ValueError for what can't be."""
        if not self.task_sets:
            return {"": self}
        sizes = {name: self._group_size_of(of_set) for name, of_set in self.task_sets.items()}
        weights = {name: of_set.weight for name, of_set in self.task_sets.items()}
        groups = groups_of_sets(self.batch_size, weights, sizes)
        return {name: self._as_run(name, batch_size=groups[name] * sizes[name]) for name in groups}

    def _group_size_of(self, of_set: TaskSetConfig) -> int:
        return of_set.group_size or self.group_size

    def _as_run(self, name: str, *, batch_size: int) -> Self:
        of_set = self.task_sets[name]
        own: dict[str, Any] = {"task_sets": {}, "batch_size": batch_size}
        own["group_size"] = self._group_size_of(of_set)
        if of_set.env is not None:
            own["env"] = of_set.env
        if of_set.has("reward"):
            own["reward"] = of_set.reward
        if of_set.has("filters"):
            own["rollout"] = self.rollout.model_copy(update={"filters": of_set.filters})
        if of_set.has("agent"):
            given = {field: getattr(of_set.agent, field) for field in of_set.agent.model_fields_set}
            own["agent"] = self.agent.model_copy(update=given)
        return self.model_copy(update=own)
