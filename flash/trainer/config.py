"""Settings of the trainer; imports no torch."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from flash.section import Names, Section
from flash.trainer.advantage_settings import AnyAdvantages, Gae, Grpo
from flash.trainer.objectives.settings import (
    Aggregation,
    AnyObjective,
    DecoupledPpo,
    KlSettings,
)

_Beta = Annotated[float, Field(ge=0, lt=1)]
ALL_LINEAR = "all-linear"
TOKENS_OF_PASS = 4096  # where nothing says more
_DEFAULTS = {"objective": "decoupled_ppo", "advantages": "grpo"}


class CriticConfig(Section):
    """A second model of the policy's size, which values states; for advantages=gae."""

    learning_rate: float = Field(1e-5, gt=0, description="of the critic's AdamW")
    clip: float | None = Field(
        0.5, gt=0, description="how far a value may move in a step before the loss stops it"
    )
    warmup_batches: int = Field(
        0, ge=0, description="at first so many batches teach the critic alone, not the policy"
    )


class LoraConfig(Section):
    """Low-rank adapters, trained in the place of the model's weights (Hu et al. 2021)."""

    rank: int = Field(0, ge=0, description="of the adapters; 0: none, all weights are trained")
    alpha: int = Field(32, ge=1, description="what an adapter adds is times alpha/rank")
    targets: Names = Field(
        (ALL_LINEAR,),
        min_length=1,
        description=f"modules that have one, by the ends of their names, as q_proj; {ALL_LINEAR}: "
        "each linear one but the head",
    )
    publish: Literal["merged", "adapters"] = Field(
        "merged",
        description="what workers get: whole weights, or the adapters alone, which vLLM servers "
        "that a run starts can take",
    )


class TrainerConfig(Section):
    """How a batch becomes a new policy version."""

    ranks: int = Field(1, ge=1, description="FSDP ranks, each a process (a GPU where there are)")
    shard_size: int | None = Field(
        None,
        ge=1,
        description="ranks that hold the weights and the optimizer once among them; each such "
        "group of ranks, of a node for example, has all of it, and groups exchange gradients "
        "alone; null: all ranks hold them once",
    )
    sequence_ranks: int = Field(
        1,
        ge=1,
        description="ranks that follow each other and share each pass, for sequences that are too "
        "long for one (sequence parallelism, as of DeepSpeed-Ulysses): each has as many of its "
        "tokens, and in attention as many of the model's heads, whose number it must divide",
    )
    aggregation: Aggregation | None = Field(
        None, description="how tokens' losses are added up; null: as is usual for the objective"
    )
    fixed_length: int | None = Field(
        None, ge=1, description="tokens that aggregation=fixed_length divides a sample's sum by"
    )
    entropy_bonus: float = Field(0.0, ge=0, description="times the entropy, taken from the loss")
    learning_rate: float = Field(1e-5, gt=0, description="of AdamW, after the warm-up")
    warmup_steps: int = Field(5, ge=0, description="optimizer steps of linear warm-up")
    decay_steps: int = Field(
        0, ge=0, description="then linear decay to 0 over so many optimizer steps; 0: constant"
    )
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    betas: tuple[_Beta, _Beta] = Field((0.9, 0.95), description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    mini_batches: int = Field(1, ge=1, description="optimizer steps a batch is divided into")
    tokens_per_micro_batch: int | None = Field(
        None,
        ge=1,
        description="tokens packed into one forward pass (a longer sample goes alone), times "
        "sequence_ranks; null: as many as a GPU has room for at the first step, 4096 on a CPU",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of forward and backward; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="recompute activations: less memory, a third more work; null: where that makes "
        "passes on a GPU so much longer that they are quicker, or a pass of "
        "tokens_per_micro_batch needs it; on a CPU not",
    )
    compile: bool = Field(
        False, description="layers by torch.compile: minutes at the start, then quicker passes"
    )
    router_replay: bool = Field(
        False,
        description="a mixture of experts takes for each token the experts that the worker chose "
        "when it sampled, with its own weights of them; see docs/models.md",
    )
    threads: int = Field(0, ge=0, description="CPU threads of a rank; 0 leaves it to torch")
    start_timeout_s: float = Field(600.0, gt=0, description="for the ranks to load the model")
    step_timeout_s: float = Field(1800.0, gt=0, description="for any one step, export or save")
    max_restarts: int = Field(
        3, ge=0, description="of ranks that died or raised, in a row without a step between them"
    )
    objective: AnyObjective = Field(
        DecoupledPpo(), description="the loss, by name; see docs/objectives.md"
    )
    advantages: AnyAdvantages = Field(Grpo(), description="by name; see docs/objectives.md")
    kl: KlSettings = KlSettings()
    critic: CriticConfig = CriticConfig()
    lora: LoraConfig = LoraConfig()

    @property
    def between_batches_s(self) -> float:
        """So long may it take from one batch to asking for the next: each of the trainer's calls
        has a deadline, and there are two between batches."""
        return self.start_timeout_s + 2 * self.step_timeout_s

    @property
    def tokens_of_pass(self) -> int:
        """Of one forward pass, on all ranks that share it, as far as that is known without a
        GPU."""
        return (self.tokens_per_micro_batch or TOKENS_OF_PASS) * self.sequence_ranks

    @property
    def has_critic(self) -> bool:
        return isinstance(self.advantages, Gae)

    @property
    def last_update(self) -> int | None:
        """The optimizer step after which the learning rate is 0; None if it never is."""
        return self.warmup_steps + self.decay_steps if self.decay_steps else None

    @property
    def finishes_advantages(self) -> bool:
        """Whether a divergence is taken from the returns before they are whitened, which takes
        logprobs, so that the trainer whitens and clips them."""
        kl = self.kl
        return kl.coefficient > 0 and kl.place == "reward" and self.advantages.whitens

    @field_validator(*_DEFAULTS, mode="before")
    @classmethod
    def _by_name(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict):
            return {"name": _DEFAULTS[info.field_name or ""], **value}
        return value

    @model_validator(mode="after")
    def _fixed_length_is_used(self) -> Self:
        if (self.aggregation == "fixed_length") != (self.fixed_length is not None):
            raise ValueError(
                f"trainer.aggregation={self.aggregation or 'null'} with trainer.fixed_length="
                f"{self.fixed_length or 'null'}: give both (aggregation=fixed_length and the "
                f"longest response, in tokens) or neither"
            )
        return self

    @model_validator(mode="after")
    def _groups_are_of_one_size(self) -> Self:
        for field in ("shard_size", "sequence_ranks"):
            size: int | None = getattr(self, field)
            if size is not None and self.ranks % size:
                raise ValueError(
                    f"trainer.{field}={size} does not divide trainer.ranks={self.ranks}: use a "
                    f"divisor of it, or leave it out"
                )
        return self

    @model_validator(mode="after")
    def _routers_are_called(self) -> Self:
        if self.router_replay and self.compile:
            raise ValueError(
                "trainer.router_replay=true with trainer.compile=true: what routers take is no "
                "part of a compiled layer: use one of the two"
            )
        return self

    @model_validator(mode="after")
    def _critic_is_used(self) -> Self:
        if not self.has_critic and self.critic != CriticConfig():
            raise ValueError(
                f"trainer.critic with trainer.advantages.name={self.advantages.name}, which has "
                f"no critic: leave it out, or use trainer.advantages=gae"
            )
        if self.has_critic and self.kl.coefficient and self.kl.place == "reward":
            raise ValueError(
                "trainer.kl.place=reward with trainer.advantages.name=gae: the critic would not "
                "know of what is taken from the returns: use trainer.kl.place=loss"
            )
        return self

    @model_validator(mode="after")
    def _adapters_are_used(self) -> Self:
        lora = self.lora
        if not lora.rank and lora != LoraConfig():
            raise ValueError(
                f"trainer.lora.alpha={lora.alpha}, trainer.lora.targets={list(lora.targets)} and "
                f"trainer.lora.publish={lora.publish} with trainer.lora.rank=0, so that there is "
                f"no adapter: give a rank, for example 16, or leave them out"
            )
        if ALL_LINEAR in lora.targets and len(lora.targets) > 1:
            raise ValueError(
                f"trainer.lora.targets={list(lora.targets)}: {ALL_LINEAR} has the others too: give "
                f"it alone, or leave it out"
            )
        if lora.rank and self.has_critic:
            raise ValueError(
                f"trainer.lora.rank={lora.rank} with trainer.advantages.name=gae: the critic is a "
                f"second model with all its weights, so that adapters would save little: use other "
                f"advantages, as grpo, or leave trainer.lora out"
            )
        return self
