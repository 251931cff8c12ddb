"""One FSDP rank: a process that answers the calls of `flash.trainer.trainer.Trainer`.

All ranks get every call at the same time, because each is a collective: step, score, export,
save. Between calls a rank does nothing.
"""

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
from numpy.typing import NDArray
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
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as untyped_logging

from flash.process import serve
from flash.trainer.checkpoint import MODEL_FOLDER, OPTIMIZER_FILE, write_state
from flash.trainer.config import TrainerConfig
from flash.trainer.objectives import Metrics, TokenBatch, make_objective
from flash.trainer.packing import MiniBatch
from flash.trainer.scorer import PACKED_ATTENTION, TokenScorer
from flash.types import Sample

logger = logging.getLogger(__name__)

# Below it one FSDP unit is faster than one a layer: gathering small layers is all overhead.
_ONE_UNIT_PARAMETERS = 50_000_000

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


_NOTHING = Sample(
    token_ids=np.zeros(2, np.int64),
    loss_mask=np.zeros(2, np.float32),
    logprobs=np.zeros(2, np.float32),
    versions=np.full(2, -1, np.int64),
)


@dataclass(frozen=True, slots=True)
class _Packed:
    """One micro-batch: its sequences one after the other, N tokens, S of them trained on."""

    token_ids_N: Tensor
    lengths: tuple[int, ...]
    trained_S: Tensor  # indices into N
    weights_S: Tensor
    behaviour_logprobs_S: Tensor
    advantages_S: Tensor
    on_policy_S: Tensor


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
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=ranks,
        )
        torch.manual_seed(seed)
        self._rank, self._ranks = rank, ranks
        self._source = model
        self._objective = make_objective(config)
        # Weights and optimizer are float32 everywhere; on a GPU layers compute in bfloat16.
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation=PACKED_ATTENTION
        )
        if config.gradient_checkpointing:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._model.train()  # for the sake of gradient checkpointing
        for module in self._model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # or logprobs would differ between two looks at the same weights
        self._scorer = TokenScorer(self._model).to(self._device)
        half = config.dtype == "bfloat16" or (config.dtype == "auto" and cuda)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if half else None, reduce_dtype=torch.float32
        )
        mesh = init_device_mesh("cuda" if cuda else "cpu", (ranks,))
        if sum(p.numel() for p in self._model.parameters()) > _ONE_UNIT_PARAMETERS:
            for module in self._model.modules():
                if type(module).__name__ in (self._model._no_split_modules or ()):
                    fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(self._scorer, mesh=mesh, mp_policy=policy)
        self._max_grad_norm = config.max_grad_norm
        self._optimizer = torch.optim.AdamW(
            self._scorer.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda done: _learning_rate_factor(done, config)
        )
        if checkpoint is not None:
            self._load(Path(checkpoint))

    # ── learning ─────────────────────────────────────────────────────────────────────────────

    def step(self, mini_batches: list[MiniBatch], version: int) -> dict[str, float]:
        """One optimizer step a mini-batch; the metrics are means over all tokens of the batch."""
        packed = [[self._pack(micro, version) for micro in m.micro_batches] for m in mini_batches]
        # With one optimizer step the proximal policy is the policy itself, at no cost.
        several = len(packed) > 1
        proximal = [[self._score(micro) if several else None for micro in mini] for mini in packed]
        sums = _Sums(self._device)
        norms: list[float] = []
        learning_rate = 0.0
        for mini, micros, proximal_of_mini in zip(mini_batches, packed, proximal, strict=True):
            for micro, known_S in zip(micros, proximal_of_mini, strict=True):
                logprobs_S = self._logprobs(micro)
                proximal_S = logprobs_S.detach() if known_S is None else known_S
                loss_S, metrics = self._objective(
                    TokenBatch(
                        logprobs_T=logprobs_S,
                        proximal_logprobs_T=proximal_S,
                        behaviour_logprobs_T=micro.behaviour_logprobs_S,
                        advantages_T=micro.advantages_S,
                    )
                )
                loss: Any = (loss_S * micro.weights_S).sum() / mini.total_weight
                # FSDP averages gradients over ranks; ours is a sum over all tokens.
                (loss * self._ranks).backward()
                sums.add(micro, loss_S, proximal_S, metrics)
            norm = torch.nn.utils.clip_grad_norm_(self._scorer.parameters(), self._max_grad_norm)
            norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
            learning_rate = float(self._schedule.get_last_lr()[0])
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._schedule.step()
        return {
            **sums.means(),
            "grad_norm": float(np.mean(norms)),
            "learning_rate": learning_rate,  # of the last of them
        }

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Logprobs of `token_ids[1:]` under the present weights."""
        with torch.no_grad():
            token_ids_N = torch.tensor(token_ids, device=self._device)
            scored_S = torch.arange(1, len(token_ids), device=self._device)
            logprobs: list[float] = self._scorer(token_ids_N, (len(token_ids),), scored_S).tolist()
        return logprobs

    @torch.no_grad()
    def _score(self, micro: _Packed) -> Tensor:
        return self._logprobs(micro)

    def _logprobs(self, micro: _Packed) -> Tensor:
        logprobs_S: Tensor = self._scorer(micro.token_ids_N, micro.lengths, micro.trained_S)
        return logprobs_S

    def _pack(self, samples: Sequence[Sample], version: int) -> _Packed:
        # A rank without samples passes something too, because every pass is a collective.
        samples = samples or [_NOTHING]
        weights_N = np.concatenate([sample.loss_mask for sample in samples])
        lengths = [sample.num_tokens for sample in samples]
        weights_N[np.cumsum([0, *lengths[:-1]])] = 0.0  # nothing predicts a first token
        (trained_S,) = np.nonzero(weights_N > 0)
        versions_N = np.concatenate([sample.versions for sample in samples])
        advantages_N = np.repeat([sample.advantage for sample in samples], lengths)

        def on_device(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(array).to(self._device)

        return _Packed(
            token_ids_N=on_device(np.concatenate([s.token_ids for s in samples])),
            lengths=tuple(lengths),
            trained_S=on_device(trained_S),
            weights_S=on_device(weights_N[trained_S]),
            behaviour_logprobs_S=on_device(
                np.concatenate([s.logprobs for s in samples])[trained_S]
            ),
            advantages_S=on_device(advantages_N[trained_S].astype(np.float32)),
            on_policy_S=on_device(versions_N[trained_S] == version),
        )

    # ── weights and checkpoints ──────────────────────────────────────────────────────────────

    def export(self, directory: str) -> None:
        """Write the weights as safetensors under their Hugging Face names; rank 0 writes."""
        weights: dict[str, Any] = get_model_state_dict(self._model, options=_FULL)
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
        weights: dict[str, Any] = get_model_state_dict(self._model, options=_FULL)
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
            write_state(partial, version)
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
        self._weight = torch.zeros((), dtype=torch.float64, device=device)
        self._gap = torch.full((), -1.0, device=device)

    def add(self, micro: _Packed, loss_S: Tensor, proximal_S: Tensor, metrics: Metrics) -> None:
        weights_S = micro.weights_S.double()
        for name, value_S in {"loss": loss_S.detach(), **metrics}.items():
            total = (value_S * weights_S).sum()
            self._sums[name] = self._sums.get(name, torch.zeros_like(total)) + total
        self._weight += weights_S.sum()
        if micro.on_policy_S.any():
            gap_S = (proximal_S - micro.behaviour_logprobs_S).abs()
            self._gap = torch.maximum(self._gap, gap_S[micro.on_policy_S].max())

    def means(self) -> dict[str, float]:
        """Means over trained tokens; `logprob_gap/max` only if any token was on policy."""
        names = sorted(self._sums)
        totals = torch.stack([self._weight, *(self._sums[name] for name in names)])
        dist.all_reduce(totals)
        dist.all_reduce(self._gap, op=dist.ReduceOp.MAX)
        weight, *sums = totals.tolist()
        means = {name: total / weight for name, total in zip(names, sums, strict=True)}
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
    transformers_logging: Any = untyped_logging
    transformers_logging.disable_progress_bar()  # a log is no terminal
    serve(Rank())
