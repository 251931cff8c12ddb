"""The critic of advantages=gae: a second model that learns what each state is worth.

It starts as the policy's own layers with a head of zeros, so that its first values are 0 and its
first advantages plain returns. One on each rank, sharded like the policy.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flash.trainer.config import TrainerConfig
from flash.trainer.fused import can_fuse, fuse_layers
from flash.trainer.layers import compile_layers, recompute_activations
from flash.trainer.loading import load_weights, unloaded
from flash.trainer.micro_batch import MicroBatch
from flash.trainer.scorer import Pass
from flash.trainer.sequence_parallel import SequenceGroup
from flash.trainer.sharding import clip_gradient, make_optimizer, shard
from flash.trainer.shards import load_shards, shards_of


def value_loss(
    values_T: Tensor, old_values_T: Tensor, returns_T: Tensor, *, clip: float | None
) -> tuple[Tensor, Tensor]:
    """½·max((V - R)², (V_clip - R)²) of each token, [T], and where the clip stopped it.

    V_clip is V, no farther than `clip` from what it was before the step. As in the code of
    Schulman et al. 2017; Engstrom et al. 2020, section 3.
    """
    plain_T = (values_T - returns_T) ** 2
    if clip is None:
        return plain_T / 2, torch.zeros_like(plain_T)
    near_T = old_values_T + (values_T - old_values_T).clamp(-clip, clip)
    clipped_T = (near_T - returns_T) ** 2
    return torch.maximum(plain_T, clipped_T) / 2, (clipped_T > plain_T).to(plain_T.dtype)


class TokenValuer(nn.Module):
    """A language model's layers with a head of one output, as a function of packed tokens."""

    def __init__(self, model: Any, *, group: SequenceGroup | None = None) -> None:
        super().__init__()
        self.group = group
        self.body = model.base_model
        self.head = nn.Linear(model.get_output_embeddings().weight.shape[1], 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, token_ids_N: Tensor, lengths: Sequence[int], valued_T: Tensor) -> Tensor:
        """Values of the states before the tokens at the indices `valued_T`, [T], in float32."""
        part = Pass.of(token_ids_N, lengths, valued_T, self.group)
        hidden_ND = self.body(**part.inputs).last_hidden_state[0]
        # Not in bfloat16, whose steps near 1 are as large as what there is to learn.
        weight_D, bias_1 = self.head.weight[0].float(), self.head.bias.float()
        return part.whole(hidden_ND[part.before_T].float() @ weight_D + bias_1)


class Critic:
    """Valuer and optimizer of one rank; every call is a collective."""

    def __init__(
        self,
        source: str,
        config: TrainerConfig,
        *,
        ranks: int,
        device: Any,
        half: bool,
        group: SequenceGroup | None = None,
    ) -> None:
        model = unloaded(source)
        self._valuer = TokenValuer(model, group=group).eval()
        shard(self._valuer, model, ranks=ranks, half=half, shard_size=config.shard_size)
        load_weights(self._valuer.body, source, device)
        if config.compile:
            compile_layers(model)
        elif can_fuse(model):
            fuse_layers(model)
        if config.gradient_checkpointing:
            self.recompute()
        self._config = config
        self._ranks = ranks
        self._device = device
        self._across = None if group is None else group.across  # each token once
        self.optimizer = make_optimizer(
            self._valuer, config, learning_rate=config.critic.learning_rate
        )

    def recompute(self) -> None:
        """From now on activations are computed again in the backward pass."""
        recompute_activations(self._valuer.body)

    @torch.no_grad()
    def values(self, micro: MicroBatch) -> Tensor:
        """Of the states before the trained tokens, [T]."""
        values_T: Tensor = self._valuer(micro.token_ids_N, micro.lengths, micro.trained_T)
        return values_T

    def step(self, micros: Sequence[MicroBatch]) -> dict[str, float]:
        """One optimizer step on a mini-batch: the mean loss over its tokens, on all ranks."""
        tokens = torch.stack([micro.mask_T.sum() for micro in micros]).sum()
        dist.all_reduce(tokens, group=self._across)
        told = torch.zeros(2, dtype=torch.float64, device=self._device)
        for micro in micros:
            values_T = self._valuer(micro.token_ids_N, micro.lengths, micro.trained_T)
            loss_T, stopped_T = value_loss(
                values_T, micro.values_T, micro.returns_T, clip=self._config.critic.clip
            )
            weights_T = micro.mask_T / tokens
            loss: Any = (loss_T * weights_T).sum()
            # FSDP averages gradients over ranks; ours is a sum over all tokens.
            (loss * self._ranks).backward()
            told += torch.stack([loss.detach(), (stopped_T * weights_T).sum()])
        norm = clip_gradient(self._valuer, self._config)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        dist.all_reduce(told, group=self._across)
        return {
            "critic/loss": float(told[0]),
            "critic/clip_fraction": float(told[1]),
            "critic/grad_norm": norm,
        }

    def shards(self) -> dict[str, Any]:
        """Of weights and optimizer, what this rank holds."""
        return shards_of(self._valuer, self.optimizer, updates=0)

    def load(self, directory: Path) -> None:
        """Goes on from what was saved."""
        load_shards(directory, self._valuer, self.optimizer)
