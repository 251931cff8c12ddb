"""What a step has to say about its tokens: the same however they were divided over ranks.

S trained tokens of a micro-batch. Means are over all trained tokens of the step, mask as weights.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flash.trainer.micro_batch import MicroBatch
from flash.trainer.objectives.regularisers import kl_estimate
from flash.trainer.objectives.token_batch import TokenBatch, TokenLoss, exp

_PERCENTILES = (1, 50, 99)


class StepStatistics:
    """Told of each micro-batch; every rank must be told of equally many, in the same order."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._sums: dict[str, Tensor] = {}  # of values times weights, and of weights
        self._gap = torch.full((), -1.0, device=device)
        self._weights: list[Tensor] = []

    def add(
        self,
        micro: MicroBatch,
        batch: TokenBatch,
        loss: TokenLoss,
        total_loss_S: Tensor,
        *,
        proximal_known: bool,
        more: Mapping[str, Tensor],
    ) -> None:
        """One micro-batch: what went into the objective and what came out.

        `total_loss_S` is the objective's with what was added; `more` has other values by token.
        """
        self._loss += (total_loss_S.detach().double() * micro.loss_weights_S).sum()
        mask_S = micro.mask_S.double()
        for name, value_S in more.items():
            self._add(name, value_S, mask_S)
        if loss.weight_T is None:
            return
        nothing_S = torch.zeros_like(mask_S)
        logprobs_S, behaviour_S = batch.logprobs_T.detach(), batch.behaviour_logprobs_T
        ratio_S = exp(logprobs_S - behaviour_S)
        self._add("kl_behaviour", kl_estimate(behaviour_S, logprobs_S, "k3"), mask_S)
        self._add("importance", ratio_S, mask_S)
        self._add("importance squared", ratio_S.double() ** 2, mask_S)
        self._add("weight", loss.weight_T, mask_S)
        self._add("weight squared", loss.weight_T.double() ** 2, mask_S)
        self._weights.append(loss.weight_T)
        for name, part_S in (
            ("ratio/clip_fraction", loss.stopped_T),
            ("weight/capped_fraction", loss.capped_T),
        ):
            self._add(name, nothing_S if part_S is None else part_S, mask_S)
        proximal_S = batch.proximal_logprobs_T
        known_S = mask_S if proximal_known else nothing_S
        fresh_S = batch.ages_T == 0
        mismatch_S = kl_estimate(behaviour_S, proximal_S, "k3")
        self._add("ratio/mean", exp(logprobs_S - proximal_S), known_S)
        self._add("mismatch/kl_fresh", mismatch_S, known_S * fresh_S)
        self._add("mismatch/kl_stale", mismatch_S, known_S * ~fresh_S)
        if proximal_known and bool(fresh_S.any()):
            gap_S = (proximal_S - behaviour_S).abs()
            self._gap = torch.maximum(self._gap, gap_S[fresh_S].max())

    def metrics(self, losses: float) -> dict[str, float]:
        """Names as in flash.telemetry.metrics; without those that no token of the step tells.

        The loss that was added up is divided by `losses`: the mini-batches, or the denominator
        of a batch that came in parts.
        """
        names = sorted(self._sums)
        totals = torch.stack([self._loss, *(s for name in names for s in self._sums[name])])
        dist.all_reduce(totals)
        dist.all_reduce(self._gap, op=dist.ReduceOp.MAX)
        loss, *rest = totals.tolist()
        sums = {name: (rest[2 * i], rest[2 * i + 1]) for i, name in enumerate(names)}
        found = {"loss": loss / losses}
        for name in ("importance", "weight"):
            if name in sums:
                squares = sums.pop(f"{name} squared")[0]
                total, count = sums.pop(name)
                found[f"{name}/mean"] = total / count
                # Kish 1965: as many tokens of weight 1 would tell as much, as a share of all.
                found[f"{name}/ess"] = total**2 / squares / count if squares else 0.0
        found |= {name: total / count for name, (total, count) in sums.items() if count}
        if self._gap >= 0:
            found["logprob_gap/max"] = float(self._gap)
        if self._weights:
            found |= self._percentiles()
        return found

    def _add(self, name: str, values_S: Tensor, weights_S: Tensor) -> None:
        sums = torch.stack([(values_S * weights_S).sum(), weights_S.sum()]).double()
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _percentiles(self) -> dict[str, float]:
        """Of the weights of all trained tokens, on all ranks."""
        mine = torch.cat(self._weights).float()
        sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=self._device)
        sizes[dist.get_rank()] = len(mine)
        dist.all_reduce(sizes)
        longest = int(sizes.max())
        padded = torch.nn.functional.pad(mine, (0, longest - len(mine)))
        everyones = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(everyones, padded)
        weights = np.concatenate(
            [
                of_rank[:size].cpu().numpy()
                for of_rank, size in zip(everyones, sizes.tolist(), strict=True)
            ]
        )
        values = np.percentile(weights, _PERCENTILES)
        return {
            f"weight/p{percent:02}": float(value)
            for percent, value in zip(_PERCENTILES, values, strict=True)
        }
