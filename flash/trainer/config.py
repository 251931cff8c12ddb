"""Settings of the trainer; imports no torch."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainerConfig(BaseModel):
    """How a batch becomes a new policy version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ranks: int = Field(1, ge=1, description="FSDP ranks, each a process (a GPU where there are)")
    objective: Literal["decoupled_ppo", "supervised"] = Field(
        "decoupled_ppo", description="the loss; see flash/trainer/objectives.py"
    )
    learning_rate: float = Field(1e-5, gt=0, description="of AdamW, after the warm-up")
    warmup_steps: int = Field(5, ge=0, description="optimizer steps of linear warm-up")
    decay_steps: int = Field(
        0, ge=0, description="then linear decay to 0 over so many optimizer steps; 0: constant"
    )
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    mini_batches: int = Field(1, ge=1, description="optimizer steps a batch is divided into")
    tokens_per_micro_batch: int = Field(
        4096, ge=1, description="tokens packed into one forward pass (a longer sample goes alone)"
    )
    clip_low: float = Field(0.2, gt=0, lt=1, description="PPO clips π/π_prox below 1 - this")
    clip_high: float = Field(0.28, gt=0, description="PPO clips π/π_prox above 1 + this")
    max_behaviour_weight: float = Field(
        2.0, ge=1, description="cap of the weight π_prox/π_behaviour of a token"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of forward and backward; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory")
    threads: int = Field(0, ge=0, description="CPU threads of a rank; 0 leaves it to torch")
    start_timeout_s: float = Field(600.0, gt=0, description="for the ranks to load the model")
    step_timeout_s: float = Field(1800.0, gt=0, description="for any one step, export or save")
