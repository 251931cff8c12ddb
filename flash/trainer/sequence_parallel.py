"""Ranks that share each pass, so that a sequence may be longer than one of them has memory for.

    tokens of a pass ─► each rank a slice ─► layers ─► logprobs of the slice ─► all, on each rank
                                             │    ▲
              all heads of the slice ─► all-to-all ─► attention: some heads of all tokens, and back

Jacobs et al. 2023 (DeepSpeed-Ulysses). torch's own context parallelism divides each sequence by
itself and knows no packs; here attention sees whole packs, windows and all.

Legend: N tokens of a pass, padded to a multiple of the ranks; M of a slice; H heads, K of keys; D
width of a head; R numbers of a token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True)
class SequenceGroup:
    """The ranks that this one shares each pass with, `size` that follow each other.

    `place`: of this rank among them. `across` are the ranks of the same place in all groups, which
    together have each token once.
    """

    group: dist.ProcessGroup
    across: dist.ProcessGroup
    size: int
    place: int

    @classmethod
    def of(cls, size: int, device: torch.device | str) -> Self | None:
        """All ranks in such groups; a collective. None where each has its passes to itself."""
        if size == 1:
            return None
        mesh = init_device_mesh(
            torch.device(device).type,
            (dist.get_world_size() // size, size),
            mesh_dim_names=("batch", "sequence"),
        )
        sequence = mesh["sequence"]
        return cls(sequence.get_group(), mesh["batch"].get_group(), size, sequence.get_local_rank())

    def slice_length(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def padded(self, token_ids_N: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        """With a sequence more, of the tokens that lack to slices of one length."""
        lacking = self._lacking(len(token_ids_N))
        if not lacking:
            return token_ids_N, lengths
        return pad(token_ids_N, (0, lacking)), (*lengths, lacking)

    def _lacking(self, tokens: int) -> int:
        return self.size * self.slice_length(tokens) - tokens

    def own(self, of_tokens_1N: Tensor) -> Tensor:
        """Those of this rank's slice, [1, M]."""
        return of_tokens_1N.tensor_split(self.size, dim=1)[self.place]

    def own_rows(self, of_tokens_NR: Tensor, *, padding: int) -> Tensor:
        """Those of this rank's slice, [M, R]; of what was padded each number is `padding`."""
        lacking = self._lacking(len(of_tokens_NR))
        return self.own(pad(of_tokens_NR, (0, 0, 0, lacking), value=padding)[None])[0]

    def all_rows(self, own_MR: Tensor) -> Tensor:
        """Those of all slices, with those of what was padded; a collective."""
        of_ranks = [torch.empty_like(own_MR) for _ in range(self.size)]
        dist.all_gather(of_ranks, own_MR, group=self.group)
        return torch.cat(of_ranks)

    def own_places(self, indices_T: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Which of the tokens at these indices of N are in this rank's slice: where in T, and where
        in M."""
        length = self.slice_length(tokens)
        in_slice_T = indices_T - self.place * length
        (places,) = torch.nonzero((in_slice_T >= 0) & (in_slice_T < length), as_tuple=True)
        return places, in_slice_T[places]

    def whole(self, own: Tensor, places: Tensor, count: int) -> Tensor:
        """[…, T], of which each rank computed those at its `places`; a collective.

        A rank's gradient goes to its own alone: all compute the same loss of the whole, and so it
        counts once.
        """
        whole = own.new_zeros((*own.shape[:-1], count))
        whole[..., places] = own.detach()
        dist.all_reduce(whole, group=self.group)
        return whole.index_copy(-1, places, own)

    def by_heads(
        self, query_1HMD: Tensor, key_1KMD: Tensor, value_1KMD: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens of this rank's share of the heads, of all heads of its slice; a collective.

        Keys of fewer heads than there are ranks are sent to several.
        """
        check_heads(query_1HMD.shape[1], self.size)
        repeats = math.lcm(key_1KMD.shape[1], self.size) // key_1KMD.shape[1]
        if repeats > 1:
            key_1KMD = key_1KMD.repeat_interleave(repeats, dim=1)
            value_1KMD = value_1KMD.repeat_interleave(repeats, dim=1)
        of_ranks = [
            tensor[0].reshape(self.size, -1, *tensor.shape[2:])
            for tensor in (query_1HMD, key_1KMD, value_1KMD)
        ]
        sent = torch.cat([part.flatten(1) for part in of_ranks], dim=1)  # one message, not three
        sizes = [part[0].numel() for part in of_ranks]
        received = torch.split(self._exchanged(sent), sizes, dim=1)
        query, key, value = (
            slices.view(part.shape).transpose(0, 1).flatten(1, 2)[None]
            for slices, part in zip(received, of_ranks, strict=True)
        )
        return query, key, value

    def by_tokens(self, attended_1NHD: Tensor) -> Tensor:
        """All heads of this rank's slice, [1, M, H, D], of its share of the heads; a collective."""
        of_slices = attended_1NHD.reshape(self.size, -1, *attended_1NHD.shape[2:])
        by_heads = self._exchanged(of_slices).transpose(0, 1)
        return by_heads.flatten(1, 2)[None].contiguous()  # models take views of it

    def _exchanged(self, of_ranks: Tensor) -> Tensor:
        """What each rank has for this one, in the order of the ranks."""
        received: Tensor = all_to_all_single_autograd(of_ranks, None, None, self.group)
        return received


def check_heads(heads: int, size: int) -> None:
    """ValueError if so many ranks can't divide them."""
    if heads % size:
        raise ValueError(
            f"trainer.sequence_ranks={size} does not divide the model's {heads} attention heads, "
            f"of which each rank computes as many: use a divisor of {heads}"
        )


def check_config(config: Any, size: int) -> None:
    """ValueError if the heads of a model of this configuration can't be divided by so many."""
    heads = getattr(config.get_text_config(), "num_attention_heads", None)
    if isinstance(heads, int):  # else they differ from layer to layer, and a pass tells
        check_heads(heads, size)
