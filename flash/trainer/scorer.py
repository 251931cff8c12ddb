"""Logprobs of packed sequences under a model, computed only for the tokens that are asked for.

The sequences lie one after the other, without padding: N tokens, of which T are scored.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flash.trainer.attention import Packing
from flash.trainer.router_replay import Routers
from flash.trainer.sequence_parallel import SequenceGroup

# Heads that are more than one matrix; their models compute their own logits.
_HEAD_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")
_LAYER_TYPES = {"full_attention", "sliding_attention"}

# What else is told of logits [C, V] and the logarithm of their sum [C]: [C].
More = Callable[[Tensor, Tensor], Tensor]


class TokenScorer(nn.Module):
    """A causal language model as a function from packed tokens to their logprobs.

    It is the module that FSDP wraps, so that one forward is one gathering of weights.

    Args:
        model: loaded with `attn_implementation=PACKED_ATTENTION`.
        kept_logits: with more logits than this, they are computed in chunks, and once more in the
            backward pass instead of kept: 128 MiB, and 1 GiB on a GPU.
        group: the ranks that share each pass; by default none does.
    """

    def __init__(
        self, model: Any, *, kept_logits: int | None = None, group: SequenceGroup | None = None
    ) -> None:
        super().__init__()
        if kept_logits is None:
            # For a GPU a chunk of few tokens is all launches and reading of the head's weights.
            kept_logits = (256 if torch.cuda.is_available() else 32) * 1024 * 1024
        config = model.config.get_text_config()
        layer_types = set(getattr(config, "layer_types", None) or ())
        if kinds := layer_types - _LAYER_TYPES:
            raise ValueError(
                f"model_type={model.config.model_type!r} has layers of the types {sorted(kinds)}, "
                f"and of packed sequences only {sorted(_LAYER_TYPES)} are known here: give a model "
                f"with these alone"
            )
        if "sliding_attention" in layer_types and not getattr(config, "sliding_window", None):
            raise ValueError(
                "config.json has layer_types with sliding_attention, but no sliding_window: give "
                "the window, or full_attention in its place"
            )
        if not model._supports_attention_backend:
            raise ValueError(by_itself(model.config.model_type))
        self.model = model
        self.group = group
        self._plain_head = not any(getattr(config, name, None) for name in _HEAD_SETTINGS)
        self.kept_logits = kept_logits
        self.routers: Routers | None = None  # those that take experts, if it has such
        self._chunk = max(1, kept_logits // int(config.vocab_size))

    def forward(
        self,
        token_ids_N: Tensor,
        lengths: Sequence[int],
        scored_T: Tensor,
        *,
        temperatures_T: Tensor | None = None,
        experts_NR: Tensor | None = None,
        with_entropy: bool = False,
        with_size: bool = False,
    ) -> Tensor:
        """Logprobs of the tokens at the indices `scored_T`, [T], float32, natural log.

        Each is given those before it in its own sequence; `lengths` says where the sequences
        end. The first token of a sequence has no logprob and must not be asked for. With
        `temperatures_T` they are those of a sampler at these temperatures. With `with_entropy` the
        answer is [2, T]: logprobs, and the entropy of what each token was chosen from; with
        `with_size` the latter is the size of the largest logit of these. `experts_NR` are those
        that routers take (flash/trainer/router_replay.py).
        """
        if self.routers is not None:
            self.routers.take(experts_NR)
        more = _entropy if with_entropy else _size if with_size else None
        part = Pass.of(token_ids_N, lengths, scored_T, self.group)
        targets_T = part.own(token_ids_N[scored_T])
        if temperatures_T is not None:
            temperatures_T = part.own(temperatures_T)
        if not self._plain_head:
            logits_NV = self.model(**part.inputs).logits[0]
            return part.whole(_pick(logits_NV[part.before_T], targets_T, temperatures_T, more))
        hidden_ND = self.model.base_model(**part.inputs).last_hidden_state[0]
        return part.whole(
            self._in_chunks(hidden_ND[part.before_T], targets_T, temperatures_T, more)
        )

    def _in_chunks(
        self,
        hidden_TD: Tensor,
        targets_T: Tensor,
        temperatures_T: Tensor | None,
        more: More | None,
    ) -> Tensor:
        head = self.model.get_output_embeddings()
        if len(targets_T) <= self._chunk:
            return _pick(head(hidden_TD), targets_T, temperatures_T, more)

        def score(hidden_CD: Tensor, targets_C: Tensor, temperatures_C: Tensor | None) -> Tensor:
            return _pick(head(hidden_CD), targets_C, temperatures_C, more)

        scored = []
        for start in range(0, len(targets_T), self._chunk):
            part = slice(start, start + self._chunk)
            temperatures_C = None if temperatures_T is None else temperatures_T[part]
            scored.append(
                checkpoint(
                    score, hidden_TD[part], targets_T[part], temperatures_C, use_reentrant=False
                )
            )
        return torch.cat(scored, dim=-1)


def by_itself(kind: str) -> str:
    """What is told of a type whose attention can't be replaced."""
    return (
        f"model_type={kind!r} computes attention by itself, which would mix packed sequences: give "
        f"a model of another type"
    )


def packed_inputs(
    token_ids_N: Tensor, lengths: Sequence[int], group: SequenceGroup | None = None
) -> dict[str, Any]:
    """The arguments of a forward pass over packed sequences of these lengths, or of this rank's
    slice of it."""
    device = token_ids_N.device
    if group is not None:
        token_ids_N, lengths = group.padded(token_ids_N, lengths)
    positions_N = torch.cat([torch.arange(length) for length in lengths]).to(device)
    of_tokens = {"input_ids": token_ids_N[None], "position_ids": positions_N[None]}
    if group is not None:
        of_tokens = {name: group.own(values_1N) for name, values_1N in of_tokens.items()}
    return {**of_tokens, "use_cache": False, "packing": Packing.of(lengths, device, group)}


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass over packed sequences, or this rank's part of it, and what is asked of it.

    `inputs` are the model's arguments, `before_T` the indices of what it answers before the tokens
    that are asked for: all T of them, or those at `places` where ranks share the pass.
    """

    inputs: dict[str, Any]
    before_T: Tensor
    count: int
    group: SequenceGroup | None
    places: Tensor | None

    @classmethod
    def of(
        cls,
        token_ids_N: Tensor,
        lengths: Sequence[int],
        asked_T: Tensor,
        group: SequenceGroup | None,
    ) -> Self:
        places, before_T = None, asked_T - 1
        if group is not None:
            places, before_T = group.own_places(before_T, len(token_ids_N))
        inputs = packed_inputs(token_ids_N, lengths, group)
        return cls(inputs, before_T, len(asked_T), group, places)

    def own(self, values_T: Tensor) -> Tensor:
        """Of one for each token that is asked for, this rank's."""
        return values_T if self.places is None else values_T[self.places]

    def whole(self, own: Tensor) -> Tensor:
        """Of each token that is asked for, […, T], on every rank; the gradient is of its own."""
        if self.group is None or self.places is None:
            return own
        return self.group.whole(own, self.places, self.count)


def _pick(
    logits_CV: Tensor, targets_C: Tensor, temperatures_C: Tensor | None, more: More | None
) -> Tensor:
    """Log-softmax at the targets, [C], in float32; with more of the logits [2, C]."""
    logits_CV = logits_CV.float()
    if temperatures_C is not None:
        logits_CV = logits_CV / temperatures_C[:, None]
    total_C = logits_CV.logsumexp(-1)
    logprobs_C = logits_CV.gather(-1, targets_C[:, None])[:, 0] - total_C
    if more is None:
        return logprobs_C
    return torch.stack([logprobs_C, more(logits_CV, total_C)])


def _entropy(logits_CV: Tensor, total_C: Tensor) -> Tensor:
    mean_logit_CV = (logits_CV - total_C[:, None]).exp() * logits_CV
    return total_C - mean_logit_CV.sum(-1)


def _size(logits_CV: Tensor, total_C: Tensor) -> Tensor:
    return torch.maximum(logits_CV.amax(-1), -logits_CV.amin(-1))
