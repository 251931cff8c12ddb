"""One FSDP rank: a process that answers the calls of `flash.trainer.trainer.Trainer`.

All ranks get every call at the same time, because each is a collective: step, score, export,
save. Between calls a rank does nothing.
"""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash.process import serve
from flash.trainer.config import TrainerConfig
from flash.trainer.objectives import Metrics, TokenBatch, make_objective
from flash.trainer.scorer import TokenScorer
from flash.types import Sample

logger = logging.getLogger(__name__)

MODEL_FOLDER = "model"
OPTIMIZER_FILE = "optimizer.pt"
STATE_FILE = "trainer.json"

# Below it one FSDP unit is faster than one a layer: gathering small layers is all overhead.
_ONE_UNIT_PARAMETERS = 50_000_000

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)

MicroBatch = list[list[Sample]]  # rows of samples


@dataclass(frozen=True, slots=True)
class _Packed:
    """One micro-batch: R rows of L tokens, each row sequences one after the other, padded."""

    token_ids_RL: Tensor
    positions_RL: Tensor
    mask_RL: Tensor
    behaviour_logprobs_RL: Tensor
    advantages_RL: Tensor
    on_policy_RL: Tensor


class Rank:
    """Model, optimizer and schedule of one rank."""

    def start(
        self,
        model: str,
        checkpoint: str | None,
        config: TrainerConfig,
        rank: int,
        ranks: int,
        rendezvous: str,
        seed: int,
    ) -> None:
        """Join the other ranks, load the model, and the optimizer if there is a checkpoint."""
        if config.threads:
            torch.set_num_threads(config.threads)
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(rank % torch.cuda.device_count())
        self._device = torch.device("cuda", torch.cuda.current_device()) if cuda else "cpu"
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=dist.FileStore(rendezvous, ranks),
            rank=rank,
            world_size=ranks,
        )
        torch.manual_seed(seed)
        self._rank, self._ranks = rank, ranks
        self._source = model
        self._objective = make_objective(config)
        # Weights and optimizer are float32 everywhere; on a GPU layers compute in bfloat16.
        self._model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        )
        if config.gradient_checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._model.train()
        self._scorer = TokenScorer(self._model).to(self._device)
        half = config.dtype == "bfloat16" or (config.dtype == "auto" and cuda)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
        )
        mesh = init_device_mesh("cuda" if cuda else "cpu", (ranks,))
        if sum(p.numel() for p in self._model.parameters()) > _ONE_UNIT_PARAMETERS:
            for layer in self._model.base_model.layers:
                fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(self._scorer, mesh=mesh, mp_policy=policy)
        self._max_grad_norm = config.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            self._scorer.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            foreach=True,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda done: _learning_rate_factor(done, config)
        )
        if checkpoint is not None:
            self._load(Path(checkpoint))

    # ── learning ─────────────────────────────────────────────────────────────────────────────

    def step(self, mini_batches: list[list[MicroBatch]], version: int) -> dict[str, float]:
        """One optimizer step a mini-batch; the metrics are means over all tokens of the batch."""
        packed = [[self._pack(micro, version) for micro in mini] for mini in mini_batches]
        # With one optimizer step the proximal policy is the policy itself, at no cost.
        several = len(packed) > 1
        proximal = [[self._score(micro) if several else None for micro in mini] for mini in packed]
        sums = _Sums(self._device)
        norms: list[float] = []
        for mini, proximal_of_mini in zip(packed, proximal, strict=True):
            total_mask = self._all_sum(sum(float(micro.mask_RL.sum()) for micro in mini))
            for micro, proximal_RL in zip(mini, proximal_of_mini, strict=True):
                logprobs_RL = self._scorer(micro.token_ids_RL, micro.positions_RL)
                if proximal_RL is None:
                    proximal_RL = logprobs_RL.detach()  # noqa: PLW2901
                loss_T, metrics = self._objective(
                    TokenBatch(
                        logprobs_T=logprobs_RL.flatten(),
                        proximal_logprobs_T=proximal_RL.flatten(),
                        behaviour_logprobs_T=micro.behaviour_logprobs_RL.flatten(),
                        advantages_T=micro.advantages_RL.flatten(),
                    )
                )
                loss = (loss_T * micro.mask_RL.flatten()).sum() / total_mask
                # FSDP averages gradients over ranks; ours is a sum over all tokens.
                (loss * self._ranks).backward()
                sums.add(micro, loss_T, proximal_RL, metrics)
            norm = torch.nn.utils.clip_grad_norm_(self._scorer.parameters(), self._max_grad_norm)
            norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._schedule.step()
        return {
            **sums.means(),
            "grad_norm": float(np.mean(norms)),
            "learning_rate": self._schedule.get_last_lr()[0],
        }

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Logprobs of `token_ids[1:]` under the present weights."""
        with torch.no_grad():
            token_ids_RL = torch.tensor([token_ids], device=self._device)
            positions_RL = torch.arange(len(token_ids), device=self._device)[None]
            logprobs: list[float] = self._scorer(token_ids_RL, positions_RL)[0, 1:].tolist()
        return logprobs

    @torch.no_grad()
    def _score(self, micro: _Packed) -> Tensor:
        scored: Tensor = self._scorer(micro.token_ids_RL, micro.positions_RL)
        return scored

    def _pack(self, rows: MicroBatch, version: int) -> _Packed:
        shape = max(1, len(rows)), max((sum(s.num_tokens for s in row) for row in rows), default=2)
        # Padding is a sequence of its own: positions from 0 on, mask 0. So is the whole of an
        # empty micro-batch: the other ranks have something to pass through the model.
        packed = {
            "token_ids_RL": np.zeros(shape, np.int64),
            "positions_RL": np.zeros(shape, np.int64),
            "mask_RL": np.zeros(shape, np.float32),
            "behaviour_logprobs_RL": np.zeros(shape, np.float32),
            "advantages_RL": np.zeros(shape, np.float32),
            "on_policy_RL": np.zeros(shape, np.bool_),
        }
        for number in range(shape[0]):
            end = 0
            for sample in rows[number] if rows else []:
                start, end = end, end + sample.num_tokens
                where = number, slice(start, end)
                packed["token_ids_RL"][where] = sample.token_ids
                packed["positions_RL"][where] = np.arange(sample.num_tokens)
                packed["mask_RL"][where] = sample.loss_mask
                packed["mask_RL"][number, start] = 0.0  # nothing predicts the first token
                packed["behaviour_logprobs_RL"][where] = sample.logprobs
                packed["advantages_RL"][where] = sample.advantage
                packed["on_policy_RL"][where] = sample.versions == version
            packed["positions_RL"][number, end:] = np.arange(shape[1] - end)
        return _Packed(
            **{name: torch.from_numpy(array).to(self._device) for name, array in packed.items()}
        )

    def _all_sum(self, value: float) -> float:
        total = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(total)
        return float(total)

    # ── weights and checkpoints ──────────────────────────────────────────────────────────────

    def export(self, directory: str) -> None:
        """Write the weights as safetensors under their Hugging Face names; rank 0 writes."""
        weights = get_model_state_dict(self._model, options=_FULL)
        if self._rank == 0:
            if getattr(self._model.config, "tie_word_embeddings", False):
                for name in self._model._tied_weights_keys or {}:
                    weights.pop(name, None)
            partial = Path(f"{directory}.partial")
            partial.mkdir(parents=True)
            tensors = {name: tensor.contiguous() for name, tensor in weights.items()}
            save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
            self._model.config.save_pretrained(partial)
            partial.rename(directory)

    def save(self, directory: str, version: int, optimizer: bool) -> None:
        """Write a Hugging Face model, and with `optimizer` all it takes to go on training."""
        weights = get_model_state_dict(self._model, options=_FULL)
        state = get_optimizer_state_dict(self._scorer, self._optimizer, options=_FULL)
        if self._rank != 0:
            return
        partial = Path(f"{directory}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        model = partial / MODEL_FOLDER if optimizer else partial
        self._model.save_pretrained(model, state_dict=weights)
        tokenizer = _tokenizer(self._source)
        if tokenizer is not None:
            tokenizer.save_pretrained(model)
        if optimizer:
            torch.save(
                {
                    "optimizer": state,
                    "schedule": self._schedule.state_dict(),
                    "rng": torch.get_rng_state(),
                },
                partial / OPTIMIZER_FILE,
            )
            # Last, so that a folder that has it is whole.
            (partial / STATE_FILE).write_text(json.dumps({"policy_version": version}))
        shutil.rmtree(directory, ignore_errors=True)
        partial.rename(directory)

    def _load(self, directory: Path) -> None:
        kept = torch.load(directory / OPTIMIZER_FILE, weights_only=True, map_location="cpu")
        set_optimizer_state_dict(
            self._scorer, self._optimizer, optim_state_dict=kept["optimizer"], options=_FULL
        )
        self._schedule.load_state_dict(kept["schedule"])
        torch.set_rng_state(kept["rng"])


class _Sums:
    """Sums over tokens, of all mini-batches and ranks."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._mask = torch.zeros((), dtype=torch.float64, device=device)
        self._gap = torch.full((), -1.0, device=device)

    def add(self, micro: _Packed, loss_T: Tensor, proximal_RL: Tensor, metrics: Metrics) -> None:
        mask_T = micro.mask_RL.flatten()
        for name, value_T in {"loss": loss_T.detach(), **metrics}.items():
            total = (value_T.double() * mask_T).sum()
            self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + total
        self._mask += mask_T.sum()
        on_policy_RL = micro.on_policy_RL & (micro.mask_RL > 0)
        if on_policy_RL.any():
            gap_RL = (proximal_RL - micro.behaviour_logprobs_RL).abs()
            self._gap = torch.maximum(self._gap, gap_RL[on_policy_RL].max())

    def means(self) -> dict[str, float]:
        """Means over masked tokens; `logprob_gap/max` only if any token was on policy."""
        names = sorted(self._sums)
        totals = torch.stack([self._mask, *(self._sums[name] for name in names)])
        dist.all_reduce(totals)
        dist.all_reduce(self._gap, op=dist.ReduceOp.MAX)
        mask, *sums = totals.tolist()
        means = {name: total / mask for name, total in zip(names, sums, strict=True)}
        if self._gap >= 0:
            means["logprob_gap/max"] = float(self._gap)
        return means


def _learning_rate_factor(done: int, config: TrainerConfig) -> float:
    """Of the learning rate in the optimizer step after `done` ones."""
    if done < config.warmup_steps:
        return (done + 1) / config.warmup_steps
    if config.decay_steps:
        return max(0.0, 1 - (done - config.warmup_steps) / config.decay_steps)
    return 1.0


def _tokenizer(source: str) -> Any:
    """The tokenizer that came with the model, if one did."""
    if os.path.isdir(source) and not (Path(source) / "tokenizer_config.json").exists():
        return None
    return AutoTokenizer.from_pretrained(source)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    serve(Rank())
