"""An α that follows what the last steps say, between 0 and the bound that the run allows.

    samples too old to learn from (effective sample size, KL) ─► half of α
    else the trainer waits for rollout ─────────────────────────► α + 0.5

The α in force is room for work: (1+α)·batch samples under way. With less room samples wait less,
and are younger when they are trained. Nothing is thrown away for it, and the bound stays the bound.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

import msgspec

_LESS = 0.5  # times α
_MORE = 0.5  # and α


class AlphaState(msgspec.Struct, frozen=True, kw_only=True):
    """What a resume keeps of it."""

    alpha: float
    seen: list[tuple[float, float, float]]
    unjudged: int


class AdaptiveAlpha:
    """Decides α after each step, from nothing but the steps it was told of.

    Without `min_ess` and `max_kl` α is always its bound.

    Args:
        bound: the run's α, which it begins with and never passes.
        min_ess: α falls if the effective sample size, a share of the tokens, is below it.
        max_kl: α falls if KL(behaviour ‖ policy), in nats a token, is above it.
        max_wait: if none of these is passed, α rises where the trainer waits for a larger
            share of its time.
        window: so many steps are judged by their means. After a change, what was under way before
            it is trained first and not judged.
        least: α never falls below it.
    """

    def __init__(
        self,
        bound: float,
        *,
        min_ess: float | None = None,
        max_kl: float | None = None,
        max_wait: float = 0.1,
        window: int = 3,
        least: float = 0.0,
    ) -> None:
        self.alpha = self._bound = bound
        self._min_ess, self._max_kl = min_ess, max_kl
        self._follows = min_ess is not None or max_kl is not None
        self._max_wait = max_wait
        self._least = least
        self._window = window
        self._seen: deque[tuple[float, float, float]] = deque(maxlen=window)
        self._unjudged = 0  # steps whose samples another α let in

    def after_step(self, metrics: Mapping[str, Any]) -> float:
        """α from now on, given the metrics of one step more."""
        if not self._follows:
            return self.alpha
        if self._unjudged:
            self._unjudged -= 1
            return self.alpha
        self._seen.append(
            (metrics["importance/ess"], metrics["kl_behaviour"], metrics["idle/trainer"])
        )
        if len(self._seen) == self._window:
            ess, kl, waited = (
                sum(values) / self._window for values in zip(*self._seen, strict=True)
            )
            too_few = self._min_ess is not None and ess < self._min_ess
            if too_few or (self._max_kl is not None and kl > self._max_kl):
                self._change(max(self._least, self.alpha * _LESS))
            elif waited > self._max_wait:
                self._change(min(self._bound, self.alpha + _MORE))
        return self.alpha

    def _change(self, alpha: float) -> None:
        if alpha != self.alpha:
            self._unjudged = math.ceil(max(alpha, self.alpha))
            self.alpha = alpha
            self._seen.clear()

    # ── through a checkpoint ─────────────────────────────────────────────────────────────────

    def state(self) -> AlphaState:
        return AlphaState(alpha=self.alpha, seen=list(self._seen), unjudged=self._unjudged)

    def restore(self, state: AlphaState) -> None:
        """Goes on where the run left off; a fixed α is what is configured."""
        if self._follows:
            self.alpha = min(self._bound, max(self._least, state.alpha))  # others by now, perhaps
            self._unjudged = state.unjudged
            self._seen.extend(state.seen)
