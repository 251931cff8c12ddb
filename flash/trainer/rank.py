"""One FSDP rank: a process that answers the calls of `flash.trainer.trainer.Trainer`.

All ranks get every call at the same time, because each is a collective: step, score, export,
save. Between calls a rank does nothing, but for its part of a checkpoint, in a thread.
"""

import itertools
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from transformers.utils import logging as untyped_logging

from flash.seeds import derived
from flash.system import machine
from flash.system.process import serve
from flash.trainer.background import BackgroundWriter
from flash.trainer.checkpoint import (
    CRITIC_FOLDER,
    MODEL_FOLDER,
    POLICY_FOLDER,
    forget_state,
    write_state,
)
from flash.trainer.config import TrainerConfig
from flash.trainer.critic import Critic
from flash.trainer.delta import write_delta
from flash.trainer.export import layout, whole_tensors, write_weights
from flash.trainer.layers import recompute_activations
from flash.trainer.loading import sharded_scorer
from flash.trainer.lora import (
    gathered_adapters,
    load_adapters,
    without_adapters,
    write_adapters,
)
from flash.trainer.micro_batch import MicroBatch, pack
from flash.trainer.objectives.choose import make_objective
from flash.trainer.objectives.regularisers import kl_estimate, kl_loss, kl_penalty
from flash.trainer.offload import Offload, make_room, memory_of
from flash.trainer.packing import NOTHING, MiniBatchShare, in_passes
from flash.trainer.passes import Room
from flash.trainer.ranks import LOOPBACK, Meeting
from flash.trainer.room import room_of
from flash.trainer.save import save_beside
from flash.trainer.scorer import TokenScorer
from flash.trainer.sequence_parallel import SequenceGroup
from flash.trainer.sharding import clip_gradient, make_optimizer
from flash.trainer.shards import load_shards, shards_of
from flash.trainer.statistics import StepStatistics
from flash.trainer.values import trained
from flash.types import Sample, Scores
from flash.worker.shared import SharedWeights, release

logger = logging.getLogger(__name__)


class Rank:
    """Model and optimizer of one rank. `listening`: the socket at which it awaits the others."""

    def __init__(self, listening: int | None = None) -> None:
        self._listening = listening
        self._shared: SharedWeights | None = None

    def start(
        self,
        model: str,
        checkpoint: str | None,
        config: TrainerConfig,
        rank: int,
        ranks: int,
        meeting: Meeting | None,
        seed: int,
        reference: str | None = None,
    ) -> str:
        """Join the other ranks, load the model, and the optimizer if there is a checkpoint.

        `meeting` is where these are; a rank that is alone needs none.
        `reference` is the model that `config.kl` keeps the policy near. The answer says why the
        model can't be trained, and is empty if it can.
        """
        if config.threads:
            torch.set_num_threads(config.threads)
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(rank % torch.cuda.device_count())
        self._device = torch.device("cuda", torch.cuda.current_device()) if cuda else "cpu"
        _keep_to(LOOPBACK if meeting is None else meeting.address)
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            store=self._store(meeting, ranks),
            rank=rank,
            world_size=ranks,
        )
        torch.manual_seed(seed)
        if not cuda:  # on a CPU it is cheap, and a batch trained again makes the same bits
            torch.use_deterministic_algorithms(True, warn_only=True)
            deterministic: Any = torch.utils.deterministic
            deterministic.fill_uninitialized_memory = False
        self._rank, self._ranks = rank, ranks
        self._group = SequenceGroup.of(config.sequence_ranks, self._device)
        self._seed = seed
        self._source = model
        self._config = config
        self._objective = make_objective(config.objective)
        self._half = config.dtype == "bfloat16" or (config.dtype == "auto" and cuda)
        self._reference: Callable[..., Tensor] | None = None
        try:
            adapted = config.lora.rank > 0
            self._scorer = self._loaded(
                model, adapters=seed if adapted else None, replays=config.router_replay
            )
            self._model: Any = self._scorer.model
            if adapted and checkpoint is not None:
                load_adapters(self._model, Path(checkpoint) / MODEL_FOLDER, config.lora)
            if config.gradient_checkpointing:
                recompute_activations(self._model)
            if adapted and reference == model:
                self._reference = without_adapters(self._scorer)
            elif reference is not None:
                self._reference = self._loaded(reference).requires_grad_(False)
        except ValueError as error:
            logger.exception("the model can't be trained")
            return " ".join(str(error).split())
        self._optimizer = make_optimizer(self._scorer, config, learning_rate=config.learning_rate)
        self._updates = 0  # optimizer steps so far
        self._critic: Critic | None = None
        if config.has_critic:
            self._critic = Critic(
                model,
                config,
                ranks=ranks,
                device=self._device,
                half=self._half,
                group=self._group,
            )
        if checkpoint is not None:
            self._load(Path(checkpoint))
        critics = [] if self._critic is None else [self._critic.optimizer]
        self._offload = Offload([self._optimizer, *critics])
        self._writer = BackgroundWriter()
        return ""

    def _store(self, meeting: Meeting | None, ranks: int) -> Any:
        """What all ranks find each other by; rank 0 has it."""
        stores: Any = dist
        if meeting is None:
            return stores.HashStore()
        more: dict[str, Any] = {"is_master": False}
        if self._listening is not None:  # by itself it would listen at every address
            more = {"is_master": True, "master_listen_fd": self._listening}
        return stores.TCPStore(
            meeting.host, meeting.port, world_size=ranks, wait_for_workers=False, **more
        )

    def _loaded(
        self, source: str, *, adapters: int | None = None, replays: bool = False
    ) -> TokenScorer:
        return sharded_scorer(
            source,
            self._config,
            device=self._device,
            half=self._half,
            adapters=adapters,
            group=self._group,
            replays=replays,
        )

    def room(self, alone: bool = False) -> Room | None:
        """How many tokens a pass of the next steps has memory for, or would have if the rank were
        `alone` on its GPU; None where that is as usual."""
        self._offload.to_device()
        return room_of(
            self._scorer,
            self._optimizer,
            recomputed=self._config.gradient_checkpointing,
            models=1 if self._critic is None else 2,
            alone=alone,
        )

    def recompute(self) -> None:
        """From now on activations are computed again in the backward pass."""
        recompute_activations(self._model)
        if self._critic is not None:
            self._critic.recompute()

    def make_room(self, share: float) -> float:
        """Leaves that share of its GPU to others, if it can, until the next step or save; the
        share that is free. All of a CPU is."""
        if not isinstance(self._device, torch.device):
            return 1.0
        return make_room(self._offload, share, partial(memory_of, self._device))

    # ── learning ─────────────────────────────────────────────────────────────────────────────

    def values(self, micro_batches: list[list[Sample]]) -> list[list[NDArray[np.float64]]]:
        """The critic's values, of each sample's trained tokens."""
        assert self._critic is not None
        return self._of_samples(micro_batches, self._critic.values)

    def penalties(self, micro_batches: list[list[Sample]]) -> list[list[NDArray[np.float64]]]:
        """What the divergence from the reference takes from the returns, before the step."""

        def penalty(micro: MicroBatch) -> Tensor:
            assert self._reference is not None
            batch = micro.with_logprobs(self._score(micro), None, 0.0)
            return kl_penalty(
                batch, self._score(micro, self._reference), estimator=self._config.kl.estimator
            )

        return self._of_samples(micro_batches, penalty)

    def _of_samples(
        self, micro_batches: list[list[Sample]], of_tokens: Callable[[MicroBatch], Tensor]
    ) -> list[list[NDArray[np.float64]]]:
        """What a function tells of each sample's trained tokens."""
        found = []
        for samples in micro_batches:
            micro = pack(samples, [0.0] * len(samples), version=0, device=self._device)
            found_T = of_tokens(micro).cpu().numpy().astype(np.float64)
            ends = np.cumsum([int(trained(sample).sum()) for sample in samples])
            found.append(np.split(found_T, ends[:-1]) if samples else [])
        return found

    def step(
        self,
        mini_batches: Sequence[MiniBatchShare],
        version: int,
        expert: Sequence[MiniBatchShare] = (),
    ) -> dict[str, float]:
        """One optimizer step a mini-batch, each with its share of what an expert wrote, if there
        is any; the metrics are over all tokens of the batch."""
        self._offload.to_device()
        self._seed_step(version)
        expert = expert or [NOTHING] * len(mini_batches)
        packed = [self._packed(mini, version) for mini in mini_batches]
        # What the first optimizer step computes is proximal already; only for later ones is there
        # something to compute before the weights change.
        proximal = [
            [
                self._score(micro) if number and self._config.objective.needs_proximal else None
                for micro in micros
            ]
            for number, micros in enumerate(packed)
        ]
        statistics, of_expert = self._no_statistics(), self._no_statistics()
        told: list[dict[str, float]] = []
        learning_rate = 0.0
        critic_alone = self._critic is not None and version < self._config.critic.warmup_batches
        for number, (micros, proximal_of_mini, imitated) in enumerate(
            zip(packed, proximal, expert, strict=True)
        ):
            for micro, proximal_T in zip(micros, proximal_of_mini, strict=True):
                loss = self._loss(micro, proximal_T, number, len(packed), statistics)
                # FSDP averages gradients over ranks; ours is a sum over all tokens.
                (loss * (1 - imitated.weight) * self._ranks).backward()
            self._imitate(imitated, of_expert)
            told.append({"grad_norm": clip_gradient(self._scorer, self._config)})
            if not critic_alone:
                learning_rate = self._update()
            self._optimizer.zero_grad(set_to_none=True)
            if self._critic is not None:
                told[-1] |= self._critic.step(micros)
        return {
            **statistics.metrics(len(packed)),
            **_metrics_of_expert(of_expert, expert),
            **{name: float(np.mean([mini[name] for mini in told])) for name in told[0]},
            "learning_rate": learning_rate,  # of the last of them
        }

    def add(self, part: MiniBatchShare, version: int, first: bool) -> None:
        """Adds a part of a batch to the gradient that `finish` uses; `first` forgets others."""
        if first:
            self._seed_step(version)
            self._optimizer.zero_grad(set_to_none=True)
            self._of_parts = self._no_statistics()
        for micro in self._packed(part, version):
            loss = self._loss(micro, None, 0, 1, self._of_parts)
            (loss * self._ranks).backward()

    def finish(self, denominator: float, expert: MiniBatchShare = NOTHING) -> dict[str, float]:
        """The optimizer step of the batch whose parts were added, and of what an expert wrote;
        metrics as of `step`."""
        self._offload.to_device()
        for parameter in self._scorer.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(denominator / (1 - expert.weight))
        of_expert = self._no_statistics()
        self._imitate(expert, of_expert)
        norm, learning_rate = clip_gradient(self._scorer, self._config), self._update()
        self._optimizer.zero_grad(set_to_none=True)
        metrics = self._of_parts.metrics(denominator) | _metrics_of_expert(of_expert, [expert])
        return {**metrics, "grad_norm": norm, "learning_rate": learning_rate}

    def _no_statistics(self) -> StepStatistics:
        return StepStatistics(self._device, None if self._group is None else self._group.across)

    def _seed_step(self, version: int) -> None:
        """A loss that draws random numbers draws the same ones when a batch is trained again."""
        torch.manual_seed(derived(self._seed, f"step {version}"))

    def _packed(self, mini: MiniBatchShare, version: int) -> list[MicroBatch]:
        return [
            pack(samples, scales, version=version, device=self._device)
            for samples, scales in zip(mini.micro_batches, mini.scales, strict=True)
        ]

    def _update(self) -> float:
        """One optimizer step; its learning rate."""
        learning_rate = _learning_rate(self._updates, self._config)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._updates += 1
        return learning_rate

    def _loss(
        self,
        micro: MicroBatch,
        proximal_T: Tensor | None,
        number: int,
        mini_batches: int,
        statistics: StepStatistics,
    ) -> Any:
        """The micro-batch's part of the loss of mini-batch `number`."""
        kl, bonus = self._config.kl, self._config.entropy_bonus
        # Before the policy's pass, of whose weights the reference may be a part.
        reference_T = None if self._reference is None else self._score(micro, self._reference)
        scored = self._scorer(
            micro.token_ids_N,
            micro.lengths,
            micro.trained_T,
            temperatures_T=micro.temperatures_T,
            experts_NR=micro.experts_NR,
            with_entropy=bonus > 0,
        )
        if self._scorer.routers is not None:  # before the backward pass, in which they may choose
            differing_N, known_N = self._scorer.routers.differing()
            at_T = micro.trained_T - 1  # what a token was chosen from
            statistics.add_mean("mismatch/experts", differing_N[at_T], micro.mask_T * known_N[at_T])
        logprobs_T = scored[0] if bonus else scored
        batch = micro.with_logprobs(logprobs_T, proximal_T, number / mini_batches)
        more: dict[str, Tensor] = {}
        if reference_T is not None:
            more["kl_reference"] = kl_estimate(logprobs_T.detach(), reference_T, "k3")
            if kl.place == "reward" and not self._config.finishes_advantages:
                penalty_T = kl_penalty(batch, reference_T, estimator=kl.estimator)
                advantages_T = batch.advantages_T - kl.coefficient * penalty_T
                batch = replace(batch, advantages_T=advantages_T)
        loss = self._objective(batch)
        loss_T = loss.loss_T
        if reference_T is not None and kl.place == "loss":
            kl_T = kl_loss(batch, reference_T, estimator=kl.estimator, corrected=kl.corrected)
            loss_T = loss_T + kl.coefficient * kl_T
        if bonus:
            loss_T = loss_T - bonus * scored[1]
            more["entropy"] = scored[1].detach()
        statistics.add(
            micro,
            batch,
            loss,
            loss_T,
            proximal_known=proximal_T is not None or number == 0,
            more=more,
        )
        return (loss_T * micro.loss_weights_T).sum()

    def _imitate(self, expert: MiniBatchShare, statistics: StepStatistics) -> None:
        """Adds to the gradient that of -log π of what an expert wrote, times its weight."""
        for micro in self._packed(expert, version=0):  # nobody sampled it: it has no age
            loss_T = -self._scorer(micro.token_ids_N, micro.lengths, micro.trained_T)
            statistics.add_loss(micro, loss_T)
            loss: Any = (loss_T * micro.loss_weights_T).sum()
            (loss * expert.weight * self._ranks).backward()

    @torch.no_grad()
    def score(self, sequences: Sequence[Sequence[int]]) -> Scores:
        """Under the present weights."""
        logprobs: list[list[float]] = []
        largest = 0.0
        for passed in in_passes(sequences, self._config.tokens_of_pass):
            lengths = [len(token_ids) for token_ids in passed]
            first = torch.ones(sum(lengths), dtype=torch.bool, device=self._device)
            first[[0, *itertools.accumulate(lengths[:-1])]] = False
            token_ids_N = torch.tensor(list(itertools.chain(*passed)), device=self._device)
            scored_T = torch.arange(len(token_ids_N), device=self._device)[first]
            logprobs_T, sizes_T = self._scorer(token_ids_N, lengths, scored_T, with_size=True)
            each = logprobs_T.split([length - 1 for length in lengths])
            logprobs += [logprobs_S.tolist() for logprobs_S in each]
            largest = max(largest, *sizes_T.tolist())
        return Scores(logprobs=logprobs, largest_logit=largest)

    @torch.no_grad()
    def _score(self, micro: MicroBatch, other: Callable[..., Tensor] | None = None) -> Tensor:
        """By the policy with the experts that workers chose, or by another model."""
        experts = {"experts_NR": micro.experts_NR} if other is None else {}
        logprobs_T: Tensor = (other or self._scorer)(
            micro.token_ids_N,
            micro.lengths,
            micro.trained_T,
            temperatures_T=micro.temperatures_T,
            **experts,
        )
        return logprobs_T

    # ── weights and checkpoints ──────────────────────────────────────────────────────────────

    def export(self, directory: str, before: str | None = None) -> float | None:
        """Write the weights as safetensors under their Hugging Face names, or the adapters where
        workers take these.

        The ranks that see the folder that rank 0 makes share the work. Rank 0 knows then which
        share of the weights changed since the export `before`.
        """
        partial = Path(f"{directory}.partial")
        if self._rank == 0:
            partial.mkdir(parents=True)
        dist.barrier()
        changed = None
        if self._config.lora.publish == "adapters":
            self._save_adapters(partial)
        else:
            write_weights(self._model, partial, dtype=self._exported, write=partial.is_dir())
            if self._rank == 0 and before is not None:
                changed = write_delta(Path(before), partial)
        if self._rank == 0:
            partial.rename(directory)
        return changed

    @property
    def _exported(self) -> torch.dtype:
        return torch.bfloat16 if self._half else torch.float32  # as layers compute

    @torch.no_grad()
    def share(self, directory: str) -> bool:
        """Has what `export` writes in memory for other processes on its GPU, until `unshare`.

        On a CPU rank 0 has it for all. No if a rank has no memory for it.
        """
        on_cpu = torch.device(self._device).type == "cpu"
        memory = None
        fits = torch.ones(1, device=self._device)
        if self._rank == 0 or not on_cpu:
            try:
                whole = layout(self._model, self._exported)
                memory = SharedWeights(whole, Path(directory), self._device)
            except torch.OutOfMemoryError:
                fits.zero_()
        dist.all_reduce(fits, dist.ReduceOp.MIN)
        if not fits.item():
            return False
        for name, tensor in whole_tensors(self._model, self._exported):
            if memory is not None:
                memory.fill([(name, tensor)])
        if memory is not None:
            memory.tell()
        self._shared = memory
        return True

    def unshare(self) -> None:
        """Forgets what `share` has made."""
        self._shared = None
        if isinstance(self._device, torch.device):
            release(self._device)
            torch.cuda.empty_cache()

    def save_model(self, directory: str) -> None:
        """Write a Hugging Face model, or its adapters if it has some.

        Each rank writes its share, in a folder that all of them see; rank 0 writes adapters.
        """
        self._offload.to_device()
        partial = Path(f"{directory}.partial")
        if self._rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        if self._config.lora.rank:
            self._save_adapters(partial)
        else:
            write_weights(self._model, partial, dtype=torch.float32, write=partial.is_dir())
        if self._rank == 0:
            save_beside(self._model, partial, source=self._source)
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)

    def _save_adapters(self, directory: Path) -> None:
        adapters = gathered_adapters(self._model)
        if self._rank == 0:
            write_adapters(self._model, adapters, directory)

    def begin_checkpoint(self, directory: str, version: int) -> None:
        """Copy all it takes to go on training, and begin to write it; `written` tells of the end.

        Each rank writes what it holds, in a folder that all of them see; rank 0 the rest.
        """
        self._offload.to_device()
        into, adapted = Path(directory), self._config.lora.rank > 0
        shards = {
            into / POLICY_FOLDER: shards_of(
                self._scorer, self._optimizer, updates=self._updates, weights=not adapted
            )
        }
        if self._critic is not None:
            shards[into / CRITIC_FOLDER] = self._critic.shards()
        adapters = gathered_adapters(self._model) if adapted else {}
        if self._rank == 0:
            forget_state(into)

        def finish() -> None:
            if self._rank != 0:
                return
            model = into / MODEL_FOLDER
            model.mkdir(exist_ok=True)
            if adapted:
                write_adapters(self._model, adapters, model)
            else:
                self._model.config.save_pretrained(model)
            save_beside(self._model, model, source=self._source)
            write_state(into, version)

        self._writer.begin(shards, finish)

    def written(self) -> "Future[None]":
        """Answered when the checkpoint that was begun last is whole."""
        return self._writer.written()

    def _load(self, directory: Path) -> None:
        self._updates = load_shards(directory / POLICY_FOLDER, self._scorer, self._optimizer)
        if self._critic is not None:
            self._critic.load(directory / CRITIC_FOLDER)


def _keep_to(address: str) -> None:
    """Has gloo and NCCL use the interface with that address, and no other, unless they are told.

    By itself gloo listens where this machine's name leads. On loopback it is told nothing else.
    """
    name = _interface(address)
    if address.startswith("127."):
        os.environ["GLOO_SOCKET_IFNAME"] = name
        return
    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={name}")  # without = it is a prefix


def _interface(address: str) -> str:
    name: str
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return name
    raise RuntimeError(
        f"no network interface of {machine.where()} has the address {address}, by which others "
        f"know it: start Ray there with --node-ip-address and one that it has"
    )


def _metrics_of_expert(
    statistics: StepStatistics, expert: Sequence[MiniBatchShare]
) -> dict[str, float]:
    """The mean over the mini-batches that imitate something; nothing if none does."""
    losses = sum(bool(mini.micro_batches) for mini in expert)
    return {"expert/loss": statistics.metrics(losses)["loss"]} if losses else {}


def _learning_rate(done: int, config: TrainerConfig) -> float:
    """In the optimizer step after `done` ones."""
    factor = 1.0
    if done < config.warmup_steps:
        factor = (done + 1) / config.warmup_steps
    elif config.decay_steps:
        factor = max(0.0, 1 - (done - config.warmup_steps) / config.decay_steps)
    return config.learning_rate * factor


def main() -> None:
    """Serves the controller's calls until it closes the connection."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    transformers_logging: Any = untyped_logging
    transformers_logging.disable_progress_bar()  # stderr is a log here
    listening = int(sys.argv[1]) if sys.argv[1:] else None
    serve(Rank(listening))
