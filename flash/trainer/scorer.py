"""Logprobs of packed sequences under a model, without keeping logits of all tokens at once.

Legend: R rows of L tokens, each row a few sequences one after the other; N = R·L; D hidden size,
V vocabulary.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Above it the logits of a chunk are computed again in the backward pass instead of kept.
_KEPT_LOGITS = 32 * 1024 * 1024
# Heads that are more than one matrix; their models compute their own logits.
_HEAD_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class TokenScorer(nn.Module):
    """A causal language model as a function from packed tokens to their logprobs.

    It is the module that FSDP wraps, so that one forward is one gathering of weights.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config = model.config.get_text_config()  # type: ignore[operator, union-attr]
        self._plain_head = not any(getattr(config, name, None) for name in _HEAD_SETTINGS)
        self._chunk = max(1, _KEPT_LOGITS // int(config.vocab_size))

    def forward(self, token_ids_RL: Tensor, positions_RL: Tensor) -> Tensor:
        """Logprob of each token given those before it in its sequence, [R, L]; float32.

        `positions_RL` starts at 0 with each sequence; attention does not cross sequences. The
        entry of a sequence's first token means nothing.
        """
        inputs = {"input_ids": token_ids_RL, "position_ids": positions_RL, "use_cache": False}
        targets_N = token_ids_RL[:, 1:].flatten()
        if self._plain_head:
            body = self.model.base_model
            hidden_RLD = body(**inputs).last_hidden_state  # type: ignore[operator]
            logprobs_N = self._in_chunks(hidden_RLD[:, :-1].flatten(0, 1), targets_N)
        else:
            logits_RLV = self.model(**inputs).logits
            logprobs_N = _pick(logits_RLV[:, :-1].flatten(0, 1), targets_N)
        return nn.functional.pad(logprobs_N.view(len(token_ids_RL), -1), (1, 0))

    def _in_chunks(self, hidden_ND: Tensor, targets_N: Tensor) -> Tensor:
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        if len(targets_N) <= self._chunk:
            return _pick(head(hidden_ND), targets_N)

        def chunk_logprobs(hidden_CD: Tensor, targets_C: Tensor) -> Tensor:
            return _pick(head(hidden_CD), targets_C)

        return torch.cat(
            [
                checkpoint(chunk_logprobs, hidden_CD, targets_C, use_reentrant=False)
                for hidden_CD, targets_C in zip(
                    hidden_ND.split(self._chunk), targets_N.split(self._chunk), strict=True
                )
            ]
        )


def _pick(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Log-softmax at the targets, [N], in float32."""
    logits_NV = logits_NV.float()
    chosen_N = logits_NV.gather(-1, targets_N[:, None])[:, 0]
    return chosen_N - logits_NV.logsumexp(-1)
