"""What a step has to say about its tokens: the same however they were divided over ranks.

Means are over all trained tokens of the step, mask as weights.
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
    """Told of each micro-batch; every rank must be told of equally many, in the same order.

    `across`: ranks that together have each token once; by default all.
    """

    def __init__(self, device: torch.device | str, across: dist.ProcessGroup | None = None) -> None:
        self._device = device
        self._across = across
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._sums: dict[str, Tensor] = {}  # of values times weights, and of weights
        self._gap = torch.full((), -1.0, device=device)
        self._weights: list[Tensor] = []

    def add(
        self,
        micro: MicroBatch,
        batch: TokenBatch,
        loss: TokenLoss,
        total_loss_T: Tensor,
        *,
        proximal_known: bool,
        more: Mapping[str, Tensor],
    ) -> None:
        """One micro-batch: what went into the objective and what came out.

        `total_loss_T` is the objective's with what was added; `more` has other values by token.
        """
        self.add_loss(micro, total_loss_T)
        mask_T = micro.mask_T.double()
        for name, value_T in more.items():
            self.add_mean(name, value_T, mask_T)
        if loss.weight_T is None:
            return
        nothing_T = torch.zeros_like(mask_T)
        logprobs_T, behaviour_T = batch.logprobs_T.detach(), batch.behaviour_logprobs_T
        ratio_T = exp(logprobs_T - behaviour_T)
        self.add_mean("kl_behaviour", kl_estimate(behaviour_T, logprobs_T, "k3"), mask_T)
        self.add_mean("importance", ratio_T, mask_T)
        self.add_mean("importance squared", ratio_T.double() ** 2, mask_T)
        self.add_mean("weight", loss.weight_T, mask_T)
        self.add_mean("weight squared", loss.weight_T.double() ** 2, mask_T)
        self._weights.append(loss.weight_T)
        for name, part_T in (
            ("ratio/clip_fraction", loss.stopped_T),
            ("weight/capped_fraction", loss.capped_T),
        ):
            self.add_mean(name, nothing_T if part_T is None else part_T, mask_T)
        proximal_T = batch.proximal_logprobs_T
        known_T = mask_T if proximal_known else nothing_T
        fresh_T = batch.ages_T == 0
        mismatch_T = kl_estimate(behaviour_T, proximal_T, "k3")
        self.add_mean("ratio/mean", exp(logprobs_T - proximal_T), known_T)
        self.add_mean("mismatch/kl_fresh", mismatch_T, known_T * fresh_T)
        self.add_mean("mismatch/kl_stale", mismatch_T, known_T * ~fresh_T)
        if proximal_known and bool(fresh_T.any()):
            gap_T = (proximal_T - behaviour_T).abs()
            self._gap = torch.maximum(self._gap, gap_T[fresh_T].max())

    def add_loss(self, micro: MicroBatch, loss_T: Tensor) -> None:
        """One micro-batch of which nothing but the loss is told."""
        self._loss += (loss_T.detach().double() * micro.loss_weights_T).sum()

    def metrics(self, losses: float) -> dict[str, float]:
        """Names as in flash.telemetry.metrics; without those that no token of the step tells.

        The loss that was added up is divided by `losses`: the mini-batches, or the denominator
        of a batch that came in parts.
        """
        names = sorted(self._sums)
        totals = torch.stack([self._loss, *(s for name in names for s in self._sums[name])])
        dist.all_reduce(totals, group=self._across)
        dist.all_reduce(self._gap, op=dist.ReduceOp.MAX, group=self._across)
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

    def add_mean(self, name: str, values_T: Tensor, weights_T: Tensor) -> None:
        """Of one micro-batch what `name` is the weighted mean of."""
        sums = torch.stack([(values_T * weights_T).sum(), weights_T.sum()]).double()
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums

    def _percentiles(self) -> dict[str, float]:
        """Of the weights of all trained tokens, on all ranks."""
        mine = torch.cat(self._weights).float()
        across = self._across
        sizes = torch.zeros(dist.get_world_size(across), dtype=torch.int64, device=self._device)
        sizes[dist.get_rank(across)] = len(mine)
        dist.all_reduce(sizes, group=across)
        longest = int(sizes.max())
        padded = torch.nn.functional.pad(mine, (0, longest - len(mine)))
        everyones = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(everyones, padded, group=across)
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
