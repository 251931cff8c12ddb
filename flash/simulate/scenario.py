"""A scenario: the job, the cluster and the workload that are simulated. Times are in seconds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from flash import config as configuration
from flash.choices import UpdateMode
from flash.config.source import read_mapping
from flash.rollout.config import RolloutSettings
from flash.section import Section
from flash.simulate.distributions import Varying, constant
from flash.simulate.replay import played

NOT_SIMULATED = {
    "adaptive_alpha": "nothing is trained here that it could follow; leave it out, and compare "
    "values of alpha",
    "stall_timeout_s": "only environments can hang here, and workload.step_timeout_s ends that; "
    "leave it out",
    "on_stall": "nothing stalls here; leave it out",
}
"""Settings of a run's `rollout` that a scenario refuses: why, and what to do instead."""


class WorkersConfig(Section):
    """The inference workers: a decode step takes step_s + n·request_s + context·context_s."""

    count: int = Field(1, ge=1, description="how many there are")
    gpus: int = Field(1, ge=0, description="GPUs of one worker")
    max_running: int = Field(64, ge=1, description="requests at one worker at a time")
    kv_tokens: int = Field(1_000_000, ge=64, description="room for keys and values in one worker")
    step_s: float = Field(0.01, ge=0, description="a decode step: one token for each request")
    request_s: float = Field(0.0, ge=0, description="more for each request in the step")
    context_s: float = Field(0.0, ge=0, description="more for each token of context in the step")
    prefill_s: float = Field(0.0, ge=0, description="a prompt's token that is not in the cache")
    overhead_s: float = Field(0.0, ge=0, description="between worker and agent, a request")
    load_s: float = Field(0.0, ge=0, description="to load published weights")
    update_mode: UpdateMode = Field("keep", description="what a publish does to requests under way")

    @model_validator(mode="after")
    def _takes_time(self) -> Self:
        if self.step_s + self.request_s == 0:
            raise ValueError("workers.step_s and workers.request_s are 0: give a step some time")
        return self


class TrainerConfig(Section):
    """The trainer: a batch takes batch_s + tokens · token_gpu_s / gpus."""

    gpus: int = Field(1, ge=1, description="GPUs of the trainer")
    batch_s: float = Field(0.0, ge=0, description="a batch, whatever its size")
    token_gpu_s: float = Field(0.0, ge=0, description="GPU seconds for each token of a batch")
    export_s: float = Field(0.0, ge=0, description="to hand the weights to the workers")


class WorkloadConfig(Section):
    """The episodes: prompt, then turns of a response and an environment step, then a reward."""

    prompt_tokens: Varying = Field(constant(512), description="of the first prompt; a task's own")
    response_tokens: Varying = Field(constant(512), description="of one response")
    response_scale: Varying = Field(
        constant(1), description="a factor of all the responses to a task: hard ones are long"
    )
    turns: Varying = Field(constant(1), description="responses in an episode")
    observation_tokens: Varying = Field(constant(0), description="between two responses")
    env_reset_s: Varying = Field(constant(0), description="an environment's reset")
    env_step_s: Varying = Field(constant(0), description="an environment's step")
    env_step_scale: Varying = Field(
        constant(1), description="a factor of all the steps of an episode: slow ones stay slow"
    )
    replay: Path | None = Field(
        None,
        description="a run's folder, whose episodes are played again: their turns, responses, "
        "steps and rewards, in place of those above",
    )
    env_fail_rate: float = Field(0.0, ge=0, lt=1, description="of environment calls that fail")
    env_hang_rate: float = Field(0.0, ge=0, lt=1, description="of environment calls that hang")
    step_timeout_s: float = Field(600.0, gt=0, description="after which a hung call fails")
    reward_s: Varying = Field(constant(0), description="an episode's reward")
    success_rate: float = Field(0.5, ge=0, le=1, description="of the episodes")

    @field_validator("replay")
    @classmethod
    def _can_be_replayed(cls, run: Path | None) -> Path | None:
        if run is not None:
            played(run)
        return run

    @model_validator(mode="after")
    def _rates_are_of_one_call(self) -> Self:
        if self.env_fail_rate + self.env_hang_rate > 1:
            raise ValueError(
                f"workload.env_fail_rate={self.env_fail_rate:g} and workload.env_hang_rate="
                f"{self.env_hang_rate:g} are more than all calls: lower one of them"
            )
        return self


class Scenario(Section):
    """One simulated run."""

    name: str = Field("scenario", description="of its files")
    seed: int = Field(0, ge=0, description="of everything that is drawn")
    steps: int | None = Field(None, ge=1, description="batches to train")
    time_s: float | None = Field(None, gt=0, description="simulated seconds to run at most")
    alpha: float = Field(1.0, ge=0, description="asynchronous ratio; 0: synchronous")
    batch_size: int = Field(256, ge=1, description="samples in a batch")
    group_size: int = Field(8, ge=1, description="episodes of one task")
    stream: bool = Field(False, description="the trainer takes groups as they finish")
    publish_every: int = Field(1, ge=1, description="steps between publishes")
    max_tokens: int = Field(32_768, ge=1, description="of one response")
    max_sequence_tokens: int = Field(131_072, ge=2, description="of a whole episode")
    grain: int | None = Field(
        None,
        ge=1,
        description="how many tokens pass through hub and agents as one; null: so many that a "
        "mean response is 32",
    )
    rollout: RolloutSettings = RolloutSettings()
    workers: WorkersConfig = WorkersConfig()
    trainer: TrainerConfig = TrainerConfig()
    workload: WorkloadConfig = WorkloadConfig()

    @field_validator("rollout")
    @classmethod
    def _can_be_simulated(cls, rollout: RolloutSettings) -> RolloutSettings:
        given = [name for name in NOT_SIMULATED if name in rollout.model_fields_set]
        if given:
            lines = [f"rollout.{name} is not simulated: {NOT_SIMULATED[name]}" for name in given]
            raise ValueError("\n".join(lines))
        return rollout

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.steps is None and self.time_s is None:
            raise ValueError("give steps or time_s: when should the simulation end?")
        if self.batch_size % self.group_size:
            below = self.batch_size - self.batch_size % self.group_size
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by group_size={self.group_size}: "
                f"use {below or self.group_size} or {below + self.group_size}"
            )
        groups = self.batch_size // self.group_size
        self.rollout.reuse.check(alpha=self.alpha, groups_per_batch=groups)
        if self.publish_every - 1 > self.alpha:
            raise ValueError(
                f"publish_every={self.publish_every} with alpha={self.alpha:g}: set alpha to "
                f"{self.publish_every - 1} or more, or publish more often"
            )
        if self.workers.kv_tokens < self.max_sequence_tokens:
            raise ValueError(
                f"workers.kv_tokens={self.workers.kv_tokens} can't hold one episode of "
                f"max_sequence_tokens={self.max_sequence_tokens}: lower the latter"
            )
        prompt = self.workload.prompt_tokens.sampler().quantile(0.5)
        if prompt >= self.max_sequence_tokens:
            raise ValueError(
                f"workload.prompt_tokens of {prompt:g} leave no room to answer in "
                f"max_sequence_tokens={self.max_sequence_tokens}: shorten prompts, or raise it"
            )
        return self

    @property
    def gpus(self) -> int:
        """All of the cluster's."""
        return self.workers.count * self.workers.gpus + self.trainer.gpus

    def tokens_as_one(self) -> int:
        """The grain; every length that hub and agents see is rounded up to multiples of it."""
        if self.grain is not None:
            return self.grain
        if self.workload.replay is not None:
            episodes = played(self.workload.replay)
            mean = sum(e.generated_tokens for e in episodes) / sum(e.turns for e in episodes)
        else:
            mean = self.workload.response_tokens.sampler().mean()
        return max(1, round(mean / 32))

    def changed(self, changes: Mapping[str, Any]) -> "Scenario":
        """The same with some fields changed, by dotted names. ValueError as for `load`."""
        settings = self.model_dump(exclude_unset=True)
        for name, value in changes.items():
            _set(settings, name, value)
        return configuration.validated(Scenario, settings)


def load(path: Path, changes: Mapping[str, Any] | None = None) -> Scenario:
    """The scenario of a YAML file. ValueError with a line for each mistake."""
    settings = {"name": path.stem, **read_mapping(path, "steps: 10")}
    for name, value in (changes or {}).items():
        _set(settings, name, value)
    return configuration.validated(Scenario, settings)


def _set(settings: dict[str, Any], name: str, value: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        inner = settings.get(section, {})
        if not isinstance(inner, dict):
            # A bare number is a constant; one of its parameters was named.
            inner = {"kind": "constant", "mean": inner}
        settings[section] = settings = dict(inner)
    settings[last] = value
