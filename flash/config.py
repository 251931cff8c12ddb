"""The configuration of a run: small frozen models, validated once, before any process starts."""

import difflib
import inspect
import math
import re
import shutil
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from flash import registry
from flash.machine import gpus, has_vllm
from flash.reward.config import AnyReward, EnvReward
from flash.section import Section
from flash.trainer.config import TrainerConfig
from flash.trainer.objectives.settings import SETTINGS, Supervised

_M = TypeVar("_M", bound=BaseModel)

SMALL = "small"

# What a section's bare value stands for: `env: frozen_lake`, `engine: embedded`.
_BARE = {
    "env": "name",
    "reward": "name",
    "engine": "kind",
    "objective": "name",
    "advantages": "name",
}
# Of vLLM's arguments: what changes the distribution, or whose logprobs are told.
_SAMPLING_ARGS = ("logprobs-mode", "generation-config", "override-generation-config")
# Other systems' names of our fields.
_ALIASES = {"async_generation_ratio": "alpha"}


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

    run: str | tuple[str, ...] = Field(
        "",
        description="an agent of your own, as a coroutine function module:name, or as a command "
        "[python, agent.py, …]; it brings its own environment",
    )
    ignore: tuple[str, ...] = Field(
        (),
        description="what its requests may ask for in vain (temperature, top_p, …); anything "
        "else that training can't allow is refused",
    )
    samples: Literal["whole", "turns"] = Field(
        "whole", description="what an episode is trained as: one sample, or one for each turn"
    )
    style: str = Field("plain", description="plain, chat, or module:Class")
    style_options: dict[str, Any] = Field({}, description="the style's arguments")
    max_turns: int | None = Field(None, ge=1, description="responses in an episode; null: no limit")
    max_tokens: int = Field(256, ge=1, description="of one response")
    max_sequence_tokens: int = Field(4096, ge=2, description="of a whole episode")
    temperature: float = Field(1.0, gt=0, description="of sampling; the trainer accounts for it")
    step_timeout_s: float = Field(60.0, gt=0, description="for one environment step")
    episode_timeout_s: float = Field(1800.0, gt=0, description="for one episode")

    @model_validator(mode="before")
    @classmethod
    def _samples_the_whole_distribution(cls, given: Any) -> Any:
        for name in ("top_p", "top_k", "min_p", "repetition_penalty"):
            if isinstance(given, Mapping) and name in given:
                raise ValueError(
                    f"agent.{name}={given[name]}: the engine's logprobs would be those of a cut "
                    f"distribution, which the trainer does not have, and every correction for "
                    f"staleness would be wrong: leave it out, and use agent.temperature"
                )
        return given

    @field_validator("run", mode="before")
    @classmethod
    def _run_is_a_name_or_a_command(cls, value: Any) -> Any:
        if isinstance(value, str):
            good = not value or (":" in value and " " not in value)
        else:
            good = (
                isinstance(value, list | tuple)
                and len(value) > 0
                and all(isinstance(word, str) for word in value)
            )
        if not good:
            raise ValueError(
                "must be a coroutine function, module:name, or a command as a list of texts: "
                "[python, agent.py]"
            )
        return value

    @field_validator("ignore", mode="before")
    @classmethod
    def _one_field_or_many(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value

    @field_validator("ignore")
    @classmethod
    def _ignore_can_be_ignored(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            from flash.door.schema import IGNORABLE  # noqa: PLC0415  (imports a server)

            if unknown := set(value) - IGNORABLE:
                raise ValueError(f"{sorted(unknown)} can't be ignored, only {sorted(IGNORABLE)}")
        return value


class EngineConfig(Section):
    """The inference workers; `--engine KIND` sets the kind alone."""

    kind: Literal["auto", "embedded", "vllm", "urls"] = Field(
        "auto",
        description="auto: urls if any are given, else vllm where it is installed and has a GPU, "
        "else embedded workers",
    )
    workers: int = Field(1, ge=1, description="embedded workers or vLLM servers to start")
    urls: tuple[str, ...] = Field(
        (), description="workers that run already, vLLM or embedded; with commas between"
    )
    api_key: str = Field("", description="bearer token of the workers at `urls`")
    max_running: int = Field(64, ge=1, description="requests at one worker at a time")
    cache_tokens: int = Field(
        65_536,
        ge=64,
        description="for keys and values; vLLM on a GPU goes by gpu_memory",
    )
    threads: int = Field(0, ge=0, description="CPU threads of a worker; 0 leaves it to torch")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the weights")
    update_mode: Literal["keep", "abort", "wait"] = Field(
        "keep", description="what a publish does to requests under way"
    )
    transport: Literal["disk", "nccl"] = Field(
        "disk",
        description="how weights get to the workers: as files in the trainer's memory, or from the "
        "trainer's GPUs to those of vLLM servers anywhere",
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs of a vLLM server")
    devices: tuple[int, ...] = Field(
        (), description="GPUs for vLLM servers; none given: those that the trainer leaves"
    )
    gpu_memory: float = Field(
        0.5, gt=0, le=1, description="share of a GPU's memory that a vLLM server takes"
    )
    vllm_args: tuple[str, ...] = Field((), description="further arguments of vLLM's servers")
    start_timeout_s: float = Field(600.0, gt=0, description="for a worker to load the model")
    request_timeout_s: float = Field(600.0, gt=0, description="for one response")
    progress_timeout_s: float = Field(
        120.0, gt=0, description="for the next tokens from a worker that streams them"
    )
    door_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="serve OpenAI's protocol and /metrics there, 0: at a free port; URL and token "
        "are in logs/door.json. Without it the door opens for agent.run alone",
    )
    gap_limit: float = Field(
        1e-3, gt=0, description="largest difference of logprobs, worker against trainer"
    )

    @field_validator("vllm_args")
    @classmethod
    def _samples_as_the_trainer_takes_it(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for word in value:
            name = word.partition("=")[0].removeprefix("--").replace("_", "-")
            if word.startswith("--") and name in _SAMPLING_ARGS:
                raise ValueError(
                    f"{word} would change what is sampled or whose logprobs are told, and every "
                    f"correction for staleness would be wrong: leave it out, and use "
                    f"agent.temperature"
                )
        return value

    @field_validator("urls", mode="before")
    @classmethod
    def _one_url_or_many(cls, value: Any) -> Any:
        given = value.split(",") if isinstance(value, str) else value
        for url in given if isinstance(given, list | tuple) else [given]:
            if not str(url).startswith(("http://", "https://")):
                raise ValueError(f"{url} is no URL: write http://host:8000, with commas between")
        return given

    @model_validator(mode="after")
    def _starts_workers_or_finds_them(self) -> Self:
        if self.kind == "urls" and not self.urls:
            raise ValueError("engine.kind=urls needs engine.urls, for example http://host:8000")
        if self.kind in ("embedded", "vllm") and self.urls:
            raise ValueError(
                f"engine.kind={self.kind} starts workers, engine.urls names some that run already: "
                f"leave one of them out"
            )
        if self.kind == "vllm" and not has_vllm():
            raise ValueError(
                "engine.kind=vllm needs vLLM, which is not installed here: run `make setup-vllm`"
            )
        if self.devices and len(self.devices) % self.tensor_parallel:
            raise ValueError(
                f"engine.devices names {len(self.devices)} GPUs, which are not divisible by "
                f"engine.tensor_parallel={self.tensor_parallel}: name more or fewer"
            )
        if self.transport == "nccl":
            self._check_nccl()
        return self

    def _check_nccl(self) -> None:
        instead = "engine.transport=disk"
        if self.kind != "vllm" and not self.urls:
            raise ValueError(
                f"engine.transport=nccl is vLLM's, and engine.kind={self.kind} can mean embedded "
                f"workers: use engine.kind=vllm, or {instead}"
            )
        if not has_vllm():
            raise ValueError(
                f"engine.transport=nccl needs vLLM, which is not installed here: run "
                f"`make setup-vllm`, or use {instead}"
            )
        if not gpus():
            raise ValueError(
                "engine.transport=nccl needs NVIDIA GPUs, and this machine shows none: use "
                f"{instead}"
            )


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


class RolloutConfig(Section):
    """Which episodes begin, and what becomes of those that fail, grow old or teach nothing."""

    schedule: Literal["queue", "batch"] = Field(
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
    filters: tuple[str, ...] = Field(
        (),
        description="what drops a complete group, for another task's: equal_rewards, or "
        "module:function; with commas between",
    )
    max_filtered: int = Field(
        10, ge=1, description="batches' worth of groups that filters may drop for one batch"
    )

    on_stale: Literal["regenerate", "wait", "drop"] = Field(
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
    on_stall: Literal["stop", "replace", "restart"] = Field(
        "stop",
        description="about what blocks: end the run (exit code 3), replace its episodes, or start "
        "its worker anew; what neither can help ends the run",
    )
    adaptive_alpha: AdaptiveAlphaConfig = AdaptiveAlphaConfig()

    @field_validator("filters", mode="before")
    @classmethod
    def _one_filter_or_many(cls, value: Any) -> Any:
        return [name for name in value.split(",") if name] if isinstance(value, str) else value

    @field_validator("filters")
    @classmethod
    def _filters_are_there(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            from flash.rollout import filters  # noqa: PLC0415  (imports NumPy)

            for name in value:
                filters.find(name)
        return value


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


class EvalConfig(Section):
    """Evaluation on held-out tasks."""

    tasks: int = Field(64, ge=1, description="episodes of an evaluation")
    temperature: float = Field(1.0, gt=0, description="of sampling")
    mode: Literal["pause", "beside"] = Field(
        "pause",
        description="pause: rollout starts nothing meanwhile; beside: it goes on, and evaluation "
        "has workers of its own, whose weights stay as they are. At the ends of a run: pause",
    )
    workers: int = Field(1, ge=1, description="of the engine's, for eval.mode=beside")


class CheckpointConfig(Section):
    """Checkpoints under runs/<name>/checkpoints."""

    every: int = Field(0, ge=0, description="steps between checkpoints; 0: only at the end")
    resume: bool = Field(False, description="go on from the newest checkpoint of this run")


class Config(Section):
    """A run."""

    name: str = Field("run", description="the run's folder under runs/")
    env: EnvConfig = Field(description="an environment, for example frozen_lake")
    model: str = Field(SMALL, description=f"{SMALL}, a directory, or a hub name like org/model")
    engine: EngineConfig = EngineConfig()
    alpha: float = Field(
        1.0,
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
    seed: int = Field(0, ge=0, description="of tasks, sampling and the small policy")
    eval_every: int = Field(10, ge=0, description="steps between evaluations; 0: only at the ends")
    runs_dir: Path = Field(Path("runs"), description="where the runs' folders are")
    agent: AgentConfig = AgentConfig()
    reward: AnyReward = Field(
        EnvReward(), description="env: the environment's own; or a stage after the last turn"
    )
    rollout: RolloutConfig = RolloutConfig()
    trainer: TrainerConfig = TrainerConfig()
    policy: PolicyConfig = PolicyConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()

    @model_validator(mode="before")
    @classmethod
    def _one_name_for_each(cls, given: Any) -> Any:
        return _without_aliases(given) if isinstance(given, Mapping) else given

    @field_validator("name")
    @classmethod
    def _name_is_one_folder(cls, value: str) -> str:
        if not re.fullmatch(r"\w[\w.-]*", value):
            raise ValueError("must be a folder's name: letters, digits, '.', '_' and '-'")
        return value

    @field_validator("env", mode="before")
    @classmethod
    def _env_by_name(cls, value: Any) -> Any:
        return {_BARE["env"]: value} if isinstance(value, str) else value

    @field_validator("engine", mode="before")
    @classmethod
    def _engine_by_kind(cls, value: Any) -> Any:
        return {_BARE["engine"]: value} if isinstance(value, str) else value

    @field_validator("reward", mode="before")
    @classmethod
    def _reward_by_name(cls, value: Any) -> Any:
        return {_BARE["reward"]: value} if isinstance(value, str) else value

    @field_validator("alpha")
    @classmethod
    def _alpha_is_a_bound(cls, value: float) -> float:
        if not (math.isfinite(value) and value >= 0):
            raise ValueError("must be a number of at least 0; 0 is synchronous training")
        return value

    @field_validator("model")
    @classmethod
    def _model_is_there(cls, value: str) -> str:
        if value != SMALL:
            _check_model(value)
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
        self._check_share()
        if self.group_size < 2 and self.trainer.advantages.compares:
            raise ValueError(
                f"group_size={self.group_size} with trainer.advantages.name="
                f"{self.trainer.advantages.name}, which compares the episodes of a group: use 2 or "
                f"more, or trainer.advantages=reinforce, which compares those of the batch"
            )
        self._check_rollout()
        self._check_staleness()
        if (reference := self.trainer.kl.reference) is not None:
            try:
                _check_model(reference)
            except ValueError as error:
                raise ValueError(f"trainer.kl.reference={reference!r}: {error}") from None
        if self.engine.transport == "nccl":
            self._check_gpus_apart()
        if self.engine.cache_tokens < self.agent.max_sequence_tokens:
            raise ValueError(
                f"engine.cache_tokens={self.engine.cache_tokens} can't hold one episode of "
                f"agent.max_sequence_tokens={self.agent.max_sequence_tokens}: raise the former"
            )
        if self.model == SMALL and self.policy.max_tokens < self.agent.max_sequence_tokens:
            raise ValueError(
                f"policy.max_tokens={self.policy.max_tokens} can't read one episode of "
                f"agent.max_sequence_tokens={self.agent.max_sequence_tokens}: raise the former"
            )
        head = self.policy.hidden_size // self.policy.heads
        if self.engine.kind == "vllm" and self.model == SMALL and not gpus() and head % 32:
            raise ValueError(
                f"policy.hidden_size={self.policy.hidden_size} with policy.heads="
                f"{self.policy.heads} gives heads of {head}; vLLM on a CPU takes 32, 64, 96, …: "
                f"change one of them"
            )
        if self.agent.max_tokens >= self.agent.max_sequence_tokens:
            raise ValueError(
                f"agent.max_tokens={self.agent.max_tokens} leaves no room for a prompt in "
                f"agent.max_sequence_tokens={self.agent.max_sequence_tokens}: raise the latter"
            )
        if self.agent.run:
            _check_run(self)
        if self.uses_environment:
            make = registry.environment(self.env.name)
            _check_arguments(make, self.env.options, "env.options")
            _check_arguments(make, self.env.options | self.env.eval_options, "env.eval_options")
        style = registry.style(self.agent.style)
        _check_arguments(style, self.agent.style_options, "agent.style_options")
        return self

    def _check_rollout(self) -> None:
        """That episodes can end in batches, and be fresh enough for them."""
        if self.rollout.adaptive_alpha.is_on and not self.alpha:
            raise ValueError(
                "rollout.adaptive_alpha with alpha=0: there is nothing to follow: set alpha to the "
                "most it may be, or leave min_ess and max_kl out"
            )
        if self.stream and self.trainer.mini_batches > 1:
            raise ValueError(
                f"stream=true with trainer.mini_batches={self.trainer.mini_batches}: a later "
                f"mini-batch needs weights that the first has changed, so it can't come in parts: "
                f"set trainer.mini_batches=1, or stream=false"
            )
        if self.stream and self.trainer.advantages.needs_batch:
            raise ValueError(
                f"stream=true with trainer.advantages.name={self.trainer.advantages.name}: these "
                f"advantages take the whole batch (its baseline, its whitening, or a critic), so "
                f"no group can be trained before the last has finished: use grpo or rloo without "
                f"whiten, or stream=false"
            )
        if self.publish_every - 1 > self.alpha:
            raise ValueError(
                f"publish_every={self.publish_every} with alpha={self.alpha:g}: at the last step "
                f"before a publish every token is {self.publish_every - 1} versions old or older: "
                f"set alpha to {self.publish_every - 1} or more, or publish more often"
            )
        if self.group_size < 2 and "equal_rewards" in self.rollout.filters:
            raise ValueError(
                f"rollout.filters=equal_rewards with group_size={self.group_size} would drop every "
                f"group: use a group_size of 2 or more, or leave the filter out"
            )

    def _check_staleness(self) -> None:
        """An objective that is wrong for stale tokens gets none, unless that is asked for."""
        objective = self.trainer.objective
        name = f"trainer.objective.name={objective.name}"
        if isinstance(objective, Supervised):
            raise ValueError(
                f"{name}: {objective.cannot_correct}: it is for warm starts; use another of "
                f"{', '.join(sorted(set(SETTINGS) - {objective.name}))}"
            )
        if objective.allows_stale:
            return
        remedy = (
            "use an objective that corrects (tis, decoupled_ppo, …), or "
            "trainer.objective.allow_stale=true to study what that does"
        )
        if self.alpha >= 1:
            raise ValueError(
                f"{name} with alpha={self.alpha:g}: tokens up to {math.floor(self.alpha)} versions "
                f"old would be trained as if they were new, because {objective.cannot_correct}: "
                f"set alpha=0, {remedy}"
            )
        if self.trainer.mini_batches > 1:
            raise ValueError(
                f"{name} with trainer.mini_batches={self.trainer.mini_batches}: all but the first "
                f"mini-batch come from weights before its own, because "
                f"{objective.cannot_correct}: set trainer.mini_batches=1, {remedy}"
            )

    def _check_share(self) -> None:
        """Of the workers, for evaluation beside rollout."""
        workers = len(self.engine.urls) or self.engine.workers
        if self.eval.mode == "beside" and self.eval.workers >= workers:
            raise ValueError(
                f"eval.workers={self.eval.workers} with eval.mode=beside leaves none of "
                f"{workers} workers to rollout: set engine.workers to "
                f"{self.eval.workers + 1} or more, or use eval.mode=pause"
            )

    def _check_gpus_apart(self) -> None:
        """NCCL takes no group in which two processes use one GPU."""
        trainers, servers = gpus()[: self.trainer.ranks], self.engine.devices
        if shared := sorted({*trainers} & {*servers}):
            raise ValueError(
                f"engine.devices={servers} and the trainer ({self.trainer.ranks} trainer.ranks) "
                f"share GPUs {shared}, which engine.transport=nccl can't: name others, or use "
                f"engine.transport=disk"
            )
        if self.engine.kind == "vllm" and not servers and len(gpus()) <= self.trainer.ranks:
            raise ValueError(
                f"engine.transport=nccl needs GPUs for vLLM beside the trainer's: "
                f"trainer.ranks={self.trainer.ranks} take all {len(gpus())}: use fewer, or "
                f"engine.transport=disk"
            )

    @property
    def uses_environment(self) -> bool:
        """An agent of the user's own has a world of its own; but a small policy has a teacher."""
        return not self.agent.run or self.model == SMALL


def _check_run(config: Config) -> None:
    """That the user's agent can be started, and that no setting speaks of ours."""
    run = config.agent.run
    if isinstance(run, tuple):
        if shutil.which(run[0]) is None:
            raise ValueError(f"agent.run={list(run)!r}: there is no command {run[0]!r}")
    else:
        act = registry.function(run, "agent.run")
        if not inspect.iscoroutinefunction(act):
            raise ValueError(f"agent.run={run!r} is no coroutine function: write async def")
        try:
            inspect.signature(act).bind(base_url="", api_key="", task=None)
        except TypeError as error:
            raise ValueError(
                f"agent.run={run!r} must take base_url, api_key and task: {error}"
            ) from None
    for field, given in (
        ("agent.max_turns", config.agent.max_turns is not None),
        ("agent.samples", config.agent.samples != "whole"),
        ("env.hosts", config.env.hosts > 0),
    ):
        if given:
            raise ValueError(f"{field} is not for an agent of your own (agent.run): leave it out")


def _check_model(model: str) -> None:
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


def _check_arguments(make: Any, options: Mapping[str, Any], field: str) -> None:
    parameters = dict(inspect.signature(make).parameters)
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    what = "environment"
    if field == "agent.style_options":
        what = "style"
        parameters.pop(next(iter(parameters), ""), None)  # the tokenizer, which is ours to give
    for name in options:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1, cutoff=0.6)
            takes = f"it takes {', '.join(parameters) or 'none'}"
            hint = f"did you mean {near[0]}?" if near else takes
            if field == "env.eval_options" and not near:
                hint += "; with --env.eval_options '{}' evaluation is on what it trains on"
            raise ValueError(f"{field}.{name} is no argument of the {what}: {hint}")


def try_environment(env: EnvConfig) -> None:
    """Makes the environment once for training and once for evaluation, to see that it can be.

    Takes seconds where it imports much. ValueError says what its constructor objects to.
    """
    make = registry.environment(env.name)
    for field, options in (
        ("env.options", env.options),
        ("env.eval_options", env.options | env.eval_options),
    ):
        try:
            make(**options).close()
        except ImportError as error:
            raise registry.missing_package("env.name", env.name, error) from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{field}: {error}") from error


# ── loading ──────────────────────────────────────────────────────────────────────────────────


def presets() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = resources.files("flash.presets")
    return {Path(str(f)).stem: Path(str(f)) for f in folder.iterdir() if str(f).endswith(".yaml")}


def load(source: str | None, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a preset or a YAML file, with `overrides` by dotted name.

    With no source there are only the overrides and the defaults.
    Raises ValueError with a line for each mistake: the field, the value and the remedy.
    """
    settings = _without_aliases(_read(source)) if source is not None else {}
    for name, value in _without_aliases(overrides or {}).items():
        _set(settings, name.split("."), value)
    return parse(settings)


def parse(settings: Mapping[str, Any]) -> Config:
    """The validated configuration of nested plain values; errors as for `load`."""
    return validated(Config, settings)


def validated(model: type[_M], settings: Mapping[str, Any]) -> _M:
    """The model of nested plain values. ValueError with a line for each mistake."""
    try:
        return model.model_validate(settings)
    except ValidationError as errors:
        lines = [_line(error, model) for error in errors.errors()]
        raise ValueError("\n".join(lines)) from None


def _without_aliases(given: Mapping[str, Any]) -> dict[str, Any]:
    settings = dict(given)
    for alias, name in _ALIASES.items():
        if alias in settings:
            value = settings.pop(alias)
            if settings.setdefault(name, value) != value:
                raise ValueError(
                    f"{name}={settings[name]} and {alias}={value} are two names of one field: "
                    f"give one"
                )
    return settings


def fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field with its dotted name, sections before what they hold.

    Of a section with variants, each of which has fields of its own: the fields of all.
    """
    for name, info in model.model_fields.items():
        yield prefix + name, info
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from fields(kind, f"{prefix}{name}.")
        elif info.discriminator is not None:
            yield from _fields_of_variants(variants(info), f"{prefix}{name}.")


def variants(info: Any) -> dict[str, type[BaseModel]]:
    """The models that a section with variants may be, by the name that chooses them."""
    return {kind.model_fields["name"].default: kind for kind in get_args(info.annotation)}


def _fields_of_variants(
    kinds: Mapping[str, type[BaseModel]], prefix: str
) -> Iterator[tuple[str, Any]]:
    """Each once, with the variants that have it in its description; no default if they differ."""
    name = FieldInfo(annotation=str, description=f"one of {', '.join(sorted(kinds))}")
    yield f"{prefix}name", name
    owners: dict[str, list[str]] = {}
    for kind, model in kinds.items():
        for field in model.model_fields:
            owners.setdefault(field, []).append(kind)
    for field in sorted(owners.keys() - {"name"}):
        infos = [kinds[kind].model_fields[field] for kind in owners[field]]
        merged = FieldInfo(annotation=infos[0].annotation)
        meanings: dict[str, list[str]] = {}
        for kind, info in zip(owners[field], infos, strict=True):
            meanings.setdefault(str(info.description), []).append(kind)
        merged.description = "; ".join(f"{', '.join(of)}: {what}" for what, of in meanings.items())
        if len({repr(info.default) for info in infos}) == 1:
            merged.default = infos[0].default
        yield prefix + field, merged


def _read(source: str) -> dict[str, Any]:
    known = presets()
    path = known.get(source, Path(source))
    if not path.is_file():
        near = difflib.get_close_matches(source, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"{source!r} is neither a preset ({', '.join(sorted(known))}) nor a YAML file{hint}"
        )
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values, at least env: NAME")
    # A run is named after what it ran, unless it says otherwise.
    return {"name": path.stem, **settings}


def _set(settings: dict[str, Any], path: list[str], value: Any) -> None:
    """Sets a nested value; a bare engine kind changes the kind, a bare environment all of it."""
    *sections, last = path
    if path == ["engine"] and isinstance(value, str):
        sections, last = ["engine"], "kind"
    for depth, section in enumerate(sections):
        inner = settings.get(section)
        if isinstance(inner, str) and section in _BARE:
            inner = {_BARE[section]: inner}
        if not isinstance(inner, dict | None):
            name = ".".join(sections[: depth + 1])
            raise ValueError(f"{name}.{last} is no field: {name} is a value, not a section")
        settings[section] = inner = dict(inner or {})
        settings = inner
    settings[last] = value


# What pydantic says in words of its own.
_REMEDIES = {
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing_size": "must be a whole number of fewer digits",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be a text; write it in quotes",
    "dict_type": "must be a mapping: {key: value}",
    "path_type": "must be a path; write it in quotes",
}


def _line(error: Any, model: type[BaseModel]) -> str:
    """One mistake in one line."""
    name, variant = _name_and_variant(error["loc"], model)
    if error["type"] in ("extra_forbidden", "invalid_key"):
        # The location and input of an invalid key say nothing of its place.
        hint = ": fields are texts"
        if error["type"] == "extra_forbidden":
            hint = _nearest(name, variant, model)
        return f"{name} is no field{hint}"
    if error["type"] == "union_tag_invalid":
        known = variants(dict(fields(model))[name])
        given = error["ctx"]["tag"]
        near = difflib.get_close_matches(given, known, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(known))}"
        return f"{name}.name={given!r}: {hint}"
    if error["type"] == "missing":
        about = next((info.description for known, info in fields(model) if known == name), None)
        return f"{name} is missing: give it a value" + (f" ({about})" if about else "")
    if error["type"] == "model_type":
        return f"{name}={error['input']!r}: must be a section; write --{name}.field value"
    message = _REMEDIES.get(error["type"], str(error["msg"]))
    message = message.removeprefix("Value error, ").replace("Input should", "must")
    message = message.replace("be greater than or equal to", "be at least")
    # An error of a whole section names its fields itself.
    if not name or (isinstance(error["input"], dict) and error["type"] == "value_error"):
        return message if name in message else f"{name}: {message}"
    return f"{name}={error['input']!r}: {message}"


def _name_and_variant(
    location: tuple[str | int, ...], model: type[BaseModel]
) -> tuple[str, str | None]:
    """The dotted name of a field, and in a section with variants which of them was chosen."""
    with_variants = [name for name, info in fields(model) if info.discriminator is not None]
    parts = [str(part) for part in location]
    for end in range(1, len(parts)):
        if ".".join(parts[:end]) in with_variants:
            return ".".join(parts[:end] + parts[end + 1 :]), parts[end]
    return ".".join(parts), None


def _nearest(name: str, variant: str | None, model: type[BaseModel]) -> str:
    """What an unknown key may have meant, or whose it is."""
    if variant is not None:
        section, _, key = name.rpartition(".")
        kinds = variants(dict(fields(model))[section])
        own = [field for field in kinds[variant].model_fields if field != "name"]
        near = difflib.get_close_matches(key, own, n=1, cutoff=0.6)
        owners = [kind for kind, other in kinds.items() if key in other.model_fields]
        of_others = f", but of {', '.join(owners)}" if owners else ""
        has = f"did you mean {near[0]}?" if near else f"{variant} has {', '.join(own) or 'none'}"
        return f" of {variant}{of_others}: {has}"
    return f": {_meant(name, model)}"


def _meant(name: str, model: type[BaseModel]) -> str:
    known = [field for field, _ in fields(model)] + (list(_ALIASES) if model is Config else [])
    section, _, key = name.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == section}
    keys = difflib.get_close_matches(key, siblings, n=1, cutoff=0.6)
    near = [siblings[k] for k in keys]
    near = near or [k for k in known if k.rpartition(".")[2] == key]
    if near:
        return f"did you mean {near[0]}?"
    if section and siblings:
        return f"{section} has {', '.join(siblings)}"
    return "see flash train --help" if model is Config else f"use {', '.join(model.model_fields)}"
