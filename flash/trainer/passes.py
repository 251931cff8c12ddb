"""How long the passes of a step are, and whether they recompute: what follows from the memory that
ranks have for them. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Self

# A pass costs a card as much as so many tokens besides its own: what an H200 came to with 8,192,
# 16,384 and 32,768 tokens of models of 0.5 and 1.5 billion parameters fits it, recomputation too.
_PASS_TOKENS = 15_000
_MOST = 32_768  # with twice as many a step of a model of 0.5 billion took as long
_RECOMPUTED_RATE = 3 / 4  # forward once more, beside forward and backward of twice that


@dataclass(frozen=True, slots=True)
class Room:
    """Tokens that a pass has memory for, if activations are kept and if they are recomputed."""

    kept: int
    recomputed: int

    def among(self, other: Self) -> Self:
        """What both ranks have room for."""
        return type(self)(min(self.kept, other.kept), min(self.recomputed, other.recomputed))

    def check(self, longest: int, *, recompute: bool | None, sequence_ranks: int) -> None:
        """ValueError if no pass has room for a sample of so many tokens."""
        fits = sequence_ranks * self.recomputed
        if longest <= fits:
            return
        how, remedy = "recomputed", ""
        if recompute is False:
            how = "kept (trainer.gradient_checkpointing=false)"
            remedy = "leave trainer.gradient_checkpointing out, "
        raise ValueError(
            f"agent.max_sequence_tokens={longest}: a sample is trained in one pass, and with "
            f"trainer.sequence_ranks={sequence_ranks} GPUs that have nothing else to hold have "
            f"room for one of {fits} tokens, activations {how}: set it to {fits} or less, "
            f"{remedy}raise trainer.sequence_ranks, train adapters (trainer.lora.rank), or take "
            f"GPUs of more memory"
        )

    def choose(
        self, tokens: int | None = None, recompute: bool | None = None, *, longest: int = 0
    ) -> tuple[int, bool]:
        """Tokens of a pass, and whether it recomputes, for the quickest step; what is given
        stays, and samples of `longest` tokens are to fit."""
        if recompute is None:
            recompute = max(tokens or 0, longest) > self.kept and self.recomputed > self.kept
            if tokens is None and not recompute:
                kept, recomputed = (
                    each / (each + _PASS_TOKENS) for each in (self._pass(False), self._pass(True))
                )
                recompute = _RECOMPUTED_RATE * recomputed > kept
        return tokens or self._pass(recompute), recompute

    def _pass(self, recompute: bool) -> int:
        return min(self.recomputed if recompute else self.kept, _MOST)

    def told(self, tokens: int, recompute: bool) -> str:
        """In a line, what was chosen, and why."""
        if not recompute:
            return f"trainer: {tokens:,} tokens a pass on a GPU, activations kept"
        return (
            f"trainer: {tokens:,} tokens a pass on a GPU, activations recomputed (kept, "
            f"{self.kept:,} would have room)"
        )


def common_room(rooms: Sequence[Room | None]) -> Room | None:
    """What all ranks have room for; None if that is not measured, as on a CPU."""
    known = [room for room in rooms if room is not None]
    return reduce(Room.among, known) if known else None
