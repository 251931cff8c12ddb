"""Settings of the inference workers, and of how the hub deals with them."""

import shlex
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator

from flash.choices import UpdateMode
from flash.section import GpuNames, Secret, Section, is_url
from flash.system import machine

# Of the servers' arguments: what changes the distribution, or which logprobs are returned.
_SAMPLING_ARGS = {
    "vllm_args": ("logprobs-mode", "generation-config", "override-generation-config"),
    "sglang_args": (
        "preferred-sampling-params", "allow-auto-truncate", "watermark-config",
        "speculative-accept-threshold-single", "speculative-accept-threshold-acc",
    ),
}  # fmt: skip
_KEY_ARGS = ("api-key", "admin-api-key", "hf-token")
# What has a field, by the names that either kind of server knows it by.
_OUR_ARGS = {
    "agent.max_sequence_tokens": ("max-model-len", "context-length"),
    "engine.tensor_parallel": ("tensor-parallel-size", "tp-size", "tp"),
    "engine.gpu_memory": ("gpu-memory-utilization", "mem-fraction-static"),
}
# What would take GPUs of others, or see none: each server sees its own alone.
_MORE_GPUS_ARGS = (
    "pipeline-parallel-size", "pp-size", "pp", "data-parallel-size", "dp-size", "dp",
)  # fmt: skip
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM has room for
_COMMANDS = {"vllm_args": "vllm serve", "sglang_args": "sglang serve"}


class EngineConfig(Section):
    """The inference workers; `--engine KIND` sets the kind alone."""

    kind: Literal["auto", "embedded", "vllm", "sglang", "urls"] = Field(
        "auto",
        description="auto: urls if any are given, else vllm where it is installed, has a GPU and a "
        "model of 100 million parameters or more, else embedded workers",
    )
    workers: int = Field(
        1,
        ge=0,
        description="embedded workers or servers to start; 0: none here, explorers play",
    )
    urls: tuple[str, ...] = Field(
        (),
        description="workers that run already, vLLM or embedded, or SGLang with engine.kind=sglang;"
        " with commas between",
    )
    api_key: Secret = Field(
        SecretStr(""), description="bearer token of the workers at `urls`, or $NAME of a variable"
    )
    max_running: int = Field(64, ge=1, description="requests at one worker at a time")
    cache_tokens: int = Field(
        65_536,
        ge=64,
        description="tokens that the KV cache of a worker holds; vLLM on a GPU goes by gpu_memory",
    )
    threads: int = Field(0, ge=0, description="CPU threads of a worker; 0 leaves it to torch")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="of the weights")
    update_mode: UpdateMode = Field(
        "keep",
        description="what a publish does to requests under way: keep goes on with the new weights, "
        "keep_stale_kv (vLLM, SGLang) does so on keys and values of the old ones, abort samples "
        "the rest anew, wait lets them end first",
    )
    transport: Literal["disk", "nccl"] = Field(
        "disk",
        description="how weights get to the workers. disk: as files in the trainer's memory, which "
        "explorers elsewhere fetch; nccl: from the trainer's GPUs to those of vLLM or SGLang "
        "servers",
    )
    colocated: bool = Field(
        False,
        description="servers on the trainer's own GPUs, in turns: they sleep while it trains, "
        "and it makes room while they sample",
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs of a server")
    devices: GpuNames = Field(
        (),
        description="GPUs for the workers, with commas between, by number, or by UUID where "
        "CUDA_VISIBLE_DEVICES has UUIDs; none given: those that the trainer leaves",
    )
    gpu_memory: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of a GPU's memory that a server takes; with engine.colocated the "
        "trainer keeps no more beside it than its weights",
    )
    vllm_args: tuple[str, ...] = Field(
        (), description="further arguments of vLLM's servers: a list, or a text as in a shell"
    )
    sglang_args: tuple[str, ...] = Field(
        (), description="further arguments of SGLang's servers: a list, or a text as in a shell"
    )
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
    gap_limit: float | None = Field(
        None,
        gt=0,
        description="by how much nine tenths of the logits may be off after a publish, worker "
        "against trainer, in nats; null: 1e-3 in float32, 1/32 of the largest logit where either "
        "side computes in half precision or may do so, half of it where servers quantize",
    )

    @property
    def server_args(self) -> tuple[str, ...]:
        """The further arguments of the servers that it starts."""
        return self.sglang_args if self.kind == "sglang" else self.vllm_args

    @field_validator("vllm_args", "sglang_args", mode="before")
    @classmethod
    def _words_of_a_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return shlex.split(value)
        except ValueError as error:
            raise ValueError(f"{error}: close each quotation, as in a shell") from error

    @field_validator("vllm_args", "sglang_args")
    @classmethod
    def _samples_as_the_trainer_takes_it(
        cls, value: tuple[str, ...], info: ValidationInfo
    ) -> tuple[str, ...]:
        assert info.field_name is not None
        if value and not value[0].startswith("-"):
            command = _COMMANDS[info.field_name]
            raise ValueError(f"{value[0]!r} is no option of {command}: write --name=value")
        for word in value:
            name = word.partition("=")[0].removeprefix("--").replace("_", "-")
            if word.startswith("--") and name in _SAMPLING_ARGS[info.field_name]:
                raise ValueError(
                    f"{word} changes what is sampled or which logprobs are returned, so that every "
                    f"correction for staleness would be wrong: leave it out, and use "
                    f"agent.temperature"
                )
            if word.startswith("--") and name in _KEY_ARGS:
                raise ValueError(
                    f"--{name}: command lines and the run's config.yaml are for others to read: "
                    f"leave it out; servers have a key of their own, and find $HF_TOKEN"
                )
            if word.startswith("--") and name == "log-level" and info.field_name == "sglang_args":
                raise ValueError(
                    f"{word}: SGLang then writes its servers' key into the run's logs: leave it out"
                )
            option = name.lstrip("-") if word.startswith("-") else ""
            for field, names in _OUR_ARGS.items():
                if option in names:
                    raise ValueError(f"{word} is {field}: leave it out, and set that")
            if option in _MORE_GPUS_ARGS:
                raise ValueError(
                    f"{word}: a server has engine.tensor_parallel GPUs, and sees no more: leave it "
                    f"out, and start more servers (engine.workers)"
                )
        return value

    @field_validator("urls", mode="before")
    @classmethod
    def _one_url_or_many(cls, value: Any) -> Any:
        given = value.split(",") if isinstance(value, str) else value
        urls = given if isinstance(given, list | tuple) else [given]
        for url in urls:
            if not is_url(url):
                raise ValueError(f"{url} is not a URL: write http://host:8000, with commas between")
            if urls.count(url) > 1:
                raise ValueError(f"{url} is given twice: give it once")
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
        if self.kind == "vllm" and not machine.has_vllm():
            raise ValueError(
                f"engine.kind=vllm needs vLLM, which is not installed here: run "
                f"{machine.how_to_install('vllm')}"
            )
        if self.kind == "sglang" and not self.urls and not machine.has_sglang():
            raise ValueError(
                f"engine.kind=sglang needs SGLang, which is not installed here: run "
                f"{machine.how_to_install('sglang')}, or name servers that run already "
                f"(engine.urls)"
            )
        if self.kind == "embedded" and self.tensor_parallel > 1:
            raise ValueError(
                f"engine.tensor_parallel={self.tensor_parallel} with engine.kind=embedded: an "
                f"embedded worker has one GPU: use engine.kind=vllm or sglang, or leave it out"
            )
        if self.devices and len(self.devices) % self.tensor_parallel:
            raise ValueError(
                f"engine.devices names {len(self.devices)} GPUs, which are not divisible by "
                f"engine.tensor_parallel={self.tensor_parallel}: name more or fewer"
            )
        if self.transport == "nccl":
            self._check_nccl()
        of_servers = self.kind in ("vllm", "sglang") or self.urls
        if self.update_mode == "keep_stale_kv" and not of_servers:
            raise ValueError(
                f"engine.update_mode=keep_stale_kv is vLLM's and SGLang's, and engine.kind="
                f"{self.kind} can mean embedded workers: use engine.kind=vllm or sglang, or "
                f"engine.update_mode=keep"
            )
        if self.colocated:
            self._check_colocated()
        return self

    def _check_colocated(self) -> None:
        if self.kind not in ("vllm", "sglang"):
            raise ValueError(
                f"engine.colocated=true with engine.kind={self.kind}: only vLLM and SGLang servers "
                f"that the run starts can sleep: use engine.kind=vllm or sglang, or leave it out"
            )
        if self.urls:
            raise ValueError(
                "engine.colocated=true with engine.urls: only servers that the run starts can "
                "sleep: leave one of them out"
            )
        if not self.workers:
            raise ValueError(
                "engine.colocated=true with engine.workers=0: there is nobody to share the GPUs "
                "with: start workers, or leave it out"
            )
        if self.transport == "nccl":
            raise ValueError(
                "engine.colocated=true with engine.transport=nccl, which is between GPUs: use "
                "engine.transport=disk"
            )
        if self.update_mode == "keep_stale_kv":
            raise ValueError(
                "engine.colocated=true with engine.update_mode=keep_stale_kv: servers that sleep "
                "keep nothing: use engine.update_mode=keep"
            )
        if self.devices:
            raise ValueError(
                f"engine.colocated=true with engine.devices={list(self.devices)}: the servers take "
                f"the trainer's GPUs, which trainer.ranks says: leave one of them out"
            )

    def _check_nccl(self) -> None:
        instead = "engine.transport=disk"
        if self.kind == "sglang":
            return
        if self.kind != "vllm" and not self.urls:
            raise ValueError(
                f"engine.transport=nccl is vLLM's and SGLang's, and engine.kind={self.kind} can "
                f"mean embedded workers: use engine.kind=vllm or sglang, or {instead}"
            )
        if not machine.has_vllm():
            raise ValueError(
                f"engine.transport=nccl needs vLLM, which is not installed here: run "
                f"{machine.how_to_install('vllm')}, or use {instead}"
            )
