"""Samples as the tensors of one forward pass: one after the other, without padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flash.trainer.objectives.token_batch import TokenBatch
from flash.trainer.values import ValuedSample
from flash.types import UNKNOWN_EXPERT, Experts, Sample

# A rank without samples passes something too, because every pass is a collective.
_NOTHING = Sample.supervised([0, 0], [0, 0], episode=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One micro-batch. `trained_T` are indices into N; `loss_weights_T` is mask times scale.

    `temperatures_T` is None if all of them were sampled at 1, `experts_NR` if no worker told any
    (int16; R experts of a token). `values_T` and `returns_T` are 0 without a critic.
    """

    token_ids_N: Tensor
    lengths: tuple[int, ...]
    trained_T: Tensor
    mask_T: Tensor
    loss_weights_T: Tensor
    temperatures_T: Tensor | None
    experts_NR: Tensor | None
    behaviour_logprobs_T: Tensor
    advantages_T: Tensor
    rewards_T: Tensor
    ages_T: Tensor
    sequences_T: Tensor
    values_T: Tensor
    returns_T: Tensor

    def with_logprobs(
        self, logprobs_T: Tensor, proximal_logprobs_T: Tensor | None, progress: float
    ) -> TokenBatch:
        """What an objective is given, once the logprobs are known."""
        if proximal_logprobs_T is None:
            proximal_logprobs_T = logprobs_T.detach()
        return TokenBatch(
            logprobs_T=logprobs_T,
            behaviour_logprobs_T=self.behaviour_logprobs_T,
            proximal_logprobs_T=proximal_logprobs_T,
            advantages_T=self.advantages_T,
            rewards_T=self.rewards_T,
            ages_T=self.ages_T,
            sequences_T=self.sequences_T,
            num_sequences=len(self.lengths),
            progress=progress,
        )


def pack(
    samples: Sequence[Sample],
    scales: Sequence[float],
    *,
    version: int,
    device: torch.device | str,
) -> MicroBatch:
    """The samples of one micro-batch with their scales, for the step that `version` begins."""
    samples, scales = (samples, scales) if samples else ([_NOTHING], [0.0])
    lengths = [sample.num_tokens for sample in samples]
    mask_N = np.concatenate([sample.loss_mask for sample in samples])
    mask_N[np.cumsum([0, *lengths[:-1]])] = 0.0  # nothing predicts a first token
    (trained_T,) = np.nonzero(mask_N > 0)
    sequences_T = np.repeat(np.arange(len(samples)), lengths)[trained_T]

    def of_tokens(name: str) -> NDArray[Any]:
        values_N: NDArray[Any] = np.concatenate([getattr(sample, name) for sample in samples])
        return values_N[trained_T]

    def of_samples(values: Sequence[float]) -> NDArray[np.float32]:
        return np.asarray(values)[sequences_T].astype(np.float32)

    def of_critic(name: str) -> NDArray[np.float32]:
        # Of a rank without samples no token is trained.
        valued = isinstance(samples[0], ValuedSample)
        return of_tokens(name) if valued else np.zeros(len(trained_T), np.float32)

    def on_device(array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(device)

    advantages_N = [np.broadcast_to(s.advantage, n) for s, n in zip(samples, lengths, strict=True)]
    temperatures_T = of_tokens("temperatures").astype(np.float32)
    experts_NR = _experts(samples)
    mask_T = mask_N[trained_T].astype(np.float32)
    loss_weights_T = mask_T * np.asarray(scales, np.float64)[sequences_T]
    return MicroBatch(
        token_ids_N=on_device(np.concatenate([sample.token_ids for sample in samples])),
        lengths=tuple(lengths),
        trained_T=on_device(trained_T),
        mask_T=on_device(mask_T),
        loss_weights_T=on_device(loss_weights_T.astype(np.float32)),
        temperatures_T=None if (temperatures_T == 1).all() else on_device(temperatures_T),
        experts_NR=None if experts_NR is None else on_device(experts_NR),
        behaviour_logprobs_T=on_device(of_tokens("logprobs").astype(np.float32)),
        advantages_T=on_device(np.concatenate(advantages_N)[trained_T].astype(np.float32)),
        rewards_T=on_device(of_samples([sample.reward for sample in samples])),
        ages_T=on_device(version - of_tokens("versions")),
        sequences_T=on_device(sequences_T),
        values_T=on_device(of_critic("values")),
        returns_T=on_device(of_critic("returns")),
    )


def _experts(samples: Sequence[Sample]) -> Experts | None:
    """Of all their tokens, [N, R]; None if no sample has any."""
    told = {sample.experts.shape[1] for sample in samples if sample.experts is not None}
    if not told:
        return None
    if len(told) > 1:
        raise ValueError(
            f"some samples have {min(told)} experts for each token, and others {max(told)}: have "
            f"all workers serve the model that is trained"
        )
    unknown_R = np.full(told.pop(), UNKNOWN_EXPERT, np.int16)
    experts_NR: Experts = np.concatenate(
        [
            np.tile(unknown_R, (sample.num_tokens, 1)) if sample.experts is None else sample.experts
            for sample in samples
        ]
    )
    return experts_NR
