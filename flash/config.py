"""The configuration of a run: small frozen models, validated once, before any process starts."""

import difflib
import math
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from flash import registry
from flash.trainer.config import TrainerConfig

SMALL = "small"


class Section(BaseModel):
    """What all sections share: nothing unknown, nothing changed later."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class AgentConfig(Section):
    """How an agent talks to the policy."""

    style: str = Field("plain", description="plain, chat, or module:Class")
    style_options: dict[str, Any] = Field({}, description="the style's arguments")
    max_turns: int | None = Field(None, ge=1, description="responses in an episode; null: no limit")
    max_tokens: int = Field(256, ge=1, description="of one response")
    max_sequence_tokens: int = Field(4096, ge=2, description="of a whole episode")
    temperature: float = Field(1.0, gt=0, description="of sampling; the trainer expects 1")
    step_timeout_s: float = Field(60.0, gt=0, description="for one environment step")
    episode_timeout_s: float = Field(1800.0, gt=0, description="for one episode")


class EngineConfig(Section):
    """The inference workers; `--engine KIND` sets the kind alone."""

    kind: Literal["auto", "embedded", "urls"] = Field(
        "auto", description="auto: urls if any are given, else embedded workers"
    )
    workers: int = Field(1, ge=1, description="embedded workers to start")
    urls: tuple[str, ...] = Field((), description="workers that run already, vLLM or embedded")
    api_key: str = Field("", description="bearer token of the workers at `urls`")
    max_running: int = Field(64, ge=1, description="requests at one worker at a time")
    cache_tokens: int = Field(65_536, ge=64, description="room for keys and values in a worker")
    threads: int = Field(0, ge=0, description="CPU threads of a worker; 0 leaves it to torch")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the weights")
    update_mode: Literal["keep", "abort", "wait"] = Field(
        "keep", description="what a publish does to requests under way"
    )
    start_timeout_s: float = Field(300.0, gt=0, description="for a worker to load the model")
    request_timeout_s: float = Field(600.0, gt=0, description="for one response")
    gap_limit: float = Field(
        1e-3, gt=0, description="largest difference of logprobs, worker against trainer"
    )


class RolloutConfig(Section):
    """What the rollout loop does with episodes that fail, grow old or hang."""

    on_stale: Literal["regenerate", "wait", "drop"] = Field(
        "regenerate", description="what becomes of an episode that would pass alpha"
    )
    max_attempts: int = Field(
        3, ge=1, description="starts of an episode before its group is given up"
    )
    stall_timeout_s: float = Field(
        600.0, gt=0, description="the run ends if no episode does so long"
    )


class PolicyConfig(Section):
    """The policy that `model=small` makes from the environment's vocabulary."""

    layers: int = Field(3, ge=1)
    hidden_size: int = Field(128, ge=8)
    heads: int = Field(4, ge=1)
    max_tokens: int = Field(2048, ge=16, description="positions")


class WarmStartConfig(Section):
    """Supervised learning from the environment's expert, for `model=small`; kept for later runs."""

    steps: int = Field(0, ge=0, description="optimizer steps; 0: no warm start")
    demonstrations: int = Field(1000, ge=1, description="expert episodes")
    batch_tokens: int = Field(4096, ge=1, description="tokens in a step")
    learning_rate: float = Field(2e-3, gt=0)
    observation_weight: float = Field(
        0.5, ge=0, description="of an observation's tokens in the loss"
    )


class EvalConfig(Section):
    """Evaluation on held-out tasks."""

    tasks: int = Field(64, ge=1, description="episodes of an evaluation")
    temperature: float = Field(1.0, gt=0)


class CheckpointConfig(Section):
    """Checkpoints under runs/<name>/checkpoints."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only at the end")
    resume: bool = Field(False, description="go on from the newest checkpoint of this run")


class Config(Section):
    """A run."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    name: str = Field("run", description="the run's folder under runs/", pattern=r"^[\w.-]+$")
    env: EnvConfig = Field(description="environment")
    model: str = Field(SMALL, description=f"{SMALL}, a directory, or a hub name like org/model")
    engine: EngineConfig = EngineConfig()
    alpha: float = Field(
        1.0,
        validation_alias=AliasChoices("alpha", "async_generation_ratio"),
        description="asynchronous ratio: how many versions old a token may be; 0: synchronous",
    )
    batch_size: int = Field(64, ge=1, description="samples in a step")
    group_size: int = Field(8, ge=2, description="episodes of one task, compared with each other")
    steps: int = Field(100, ge=1, description="policy versions to train")
    seed: int = Field(0, ge=0)
    eval_every: int = Field(10, ge=0, description="steps between evaluations; 0: only at the ends")
    runs_dir: Path = Field(Path("runs"), description="where the runs' folders are")
    agent: AgentConfig = AgentConfig()
    rollout: RolloutConfig = RolloutConfig()
    trainer: TrainerConfig = TrainerConfig()
    policy: PolicyConfig = PolicyConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @field_validator("env", mode="before")
    @classmethod
    def _env_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("engine", mode="before")
    @classmethod
    def _engine_by_kind(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("alpha")
    @classmethod
    def _alpha_is_a_bound(cls, value: float) -> float:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError("must be a number of at least 0; 0 is synchronous training")
        return value

    @field_validator("model")
    @classmethod
    def _model_is_there(cls, value: str) -> str:
        looks_like_path = value.startswith((".", "/", "~")) or value.count("/") > 1
        if value != SMALL and looks_like_path and not Path(value).expanduser().is_dir():
            raise ValueError("there is no such directory; a hub name has the form org/model")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.batch_size % self.group_size:
            below = self.batch_size - self.batch_size % self.group_size
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by group_size={self.group_size}: "
                f"use {below or self.group_size} or {below + self.group_size}"
            )
        if self.trainer.mini_batches > self.batch_size:
            raise ValueError(
                f"trainer.mini_batches={self.trainer.mini_batches} exceeds batch_size="
                f"{self.batch_size}: use fewer"
            )
        if self.engine.kind == "urls" and not self.engine.urls:
            raise ValueError("engine.kind=urls needs engine.urls, for example '[http://host:8000]'")
        if self.engine.cache_tokens < self.agent.max_sequence_tokens:
            raise ValueError(
                f"engine.cache_tokens={self.engine.cache_tokens} can't hold one episode of "
                f"agent.max_sequence_tokens={self.agent.max_sequence_tokens}: raise the former"
            )
        registry.environment(self.env.name)
        registry.style(self.agent.style)
        return self


# ── loading ──────────────────────────────────────────────────────────────────────────────────


def presets() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = resources.files("flash.presets")
    return {Path(str(f)).stem: Path(str(f)) for f in folder.iterdir() if str(f).endswith(".yaml")}


def load(source: str, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a preset or a YAML file, with `overrides` by dotted name.

    Raises ValueError with a line for each mistake: the field, the value and the remedy.
    """
    settings = _read(source)
    for name, value in (overrides or {}).items():
        _set(settings, name.split("."), value)
    return parse(settings)


def parse(settings: Mapping[str, Any]) -> Config:
    """The validated configuration of nested plain values; errors as for `load`."""
    given = [settings.get("alpha"), settings.get("async_generation_ratio")]
    if None not in given and given[0] != given[1]:
        raise ValueError(
            f"alpha={given[0]} and async_generation_ratio={given[1]} are two names of one field: "
            f"give one"
        )
    try:
        return Config.model_validate(settings)
    except ValidationError as errors:
        lines = [_line(error) for error in errors.errors()]
        raise ValueError("\n".join(lines)) from None


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field with its dotted name, sections before what they hold."""
    for name, info in model.model_fields.items():
        yield prefix + name, info
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")


def _read(source: str) -> dict[str, Any]:
    known = presets()
    path = known.get(source, Path(source))
    if not path.is_file():
        raise ValueError(
            f"{source!r} is neither a preset ({', '.join(sorted(known))}) nor a YAML file"
        )
    try:
        settings = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values")
    # A run is named after what it ran, unless it says otherwise.
    return {"name": path.stem, **settings}


def _set(settings: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets a nested value; a bare engine kind changes the kind, a bare environment all of it."""
    *sections, last = path
    if path == ["engine"] and isinstance(value, str):
        sections, last = ["engine"], "kind"
    if path == ["async_generation_ratio"]:
        settings.pop("alpha", None)
    if path == ["alpha"]:
        settings.pop("async_generation_ratio", None)
    for section in sections:
        inner = settings.get(section)
        if isinstance(inner, str):  # `env: name`, `engine: kind`
            inner = {"name" if section == "env" else "kind": inner}
        settings[section] = inner = dict(inner or {})
        settings = inner
    settings[last] = value


def _line(error: Any) -> str:
    """One mistake in one line."""
    name = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        names = [known for known, _ in fields()]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        if not near:  # perhaps the right key in the wrong section
            near = [known for known in names if known.rsplit(".")[-1] == name.rsplit(".")[-1]][:1]
        hint = f"did you mean {near[0]}?" if near else "see flash train --help"
        return f"{name} is no field: {hint}"
    if error["type"] == "missing":
        return f"{name} is missing: give it a value"
    if not name:
        return str(message)
    return f"{name}={error['input']!r}: {message}"
