"""Whether what is trained on is shorter than what was begun: the bias of not waiting.

A loop that hands over what is complete, evicts what grows old and cancels what is redundant trains
on quick episodes more often than on slow ones. Length is measured in turns, in sampled tokens and
in seconds. What was given up, or still runs, is known to be longer than it got; so the mean length
of all that were admitted is taken from Kaplan & Meier's estimate of its distribution (1958).
Of a response under way, or cut off, those tokens count that its worker has told of.
"""

import logging
import math
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np

from flash.rollout.episode import Episode
from flash.rollout.observer import Observer
from flash.rollout.record import EpisodeRecord

logger = logging.getLogger(__name__)

_BIN = math.log(1.05)  # lengths are told apart by 5%, so that a run of millions takes no memory
_ENOUGH = 200  # episodes trained before a bias is worth a warning
_ALARM = 0.8


class LengthBias(Observer):
    """Follows every episode of a run from its admission to its end."""

    def __init__(self) -> None:
        self._lengths = {name: _Lengths() for name in ("turns", "tokens", "seconds")}
        self._running: dict[int, Episode] = {}
        self._trained = 0
        self._warned = False

    def admitted(self, episode: Episode) -> None:
        self._running[episode.id] = episode

    def played(self, episode: Episode) -> None:
        del self._running[episode.id]
        for name, length in _lengths_of(episode).items():
            lengths = self._lengths[name]
            kind = lengths.whole if episode.trajectory is not None else lengths.cut_off
            kind[_bin(length)] += 1

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        if record.outcome == "trained":
            self._trained += 1
            for name, length in _lengths_of(episode).items():
                self._lengths[name].trained[_bin(length)] += 1

    def metrics(self) -> dict[str, float]:
        """`bias/turns`, `bias/tokens`, `bias/seconds`: trained over admitted, since the start."""
        so_far = _bins_so_far(self._running.values())
        found = {
            f"bias/{name}": lengths.ratio(so_far[name]) for name, lengths in self._lengths.items()
        }
        low = min(found.values())
        if low < _ALARM and self._trained >= _ENOUGH and not self._warned:
            self._warned = True
            logger.warning(
                "slow episodes are starved: those trained on have %s of the length of those begun; "
                "rollout.on_stale=wait, a larger alpha or fewer redundant ones make it less",
                ", ".join(f"{name} {value:.0%}" for name, value in found.items()),
            )
        return found


class _Lengths:
    """Counts by bin."""

    def __init__(self) -> None:
        self.whole: Counter[int] = Counter()
        self.cut_off: Counter[int] = Counter()
        self.trained: Counter[int] = Counter()

    def ratio(self, running: Counter[int]) -> float:
        admitted = mean_with_cut_off(self.whole, self.cut_off + running)
        trained = mean_with_cut_off(self.trained, Counter())
        return trained / admitted if admitted else 1.0


def mean_with_cut_off(whole: Counter[int], cut_off: Counter[int]) -> float:
    """Mean of lengths, some of which are only known to be longer; of bins. Kaplan & Meier 1958.

    Up to the longest: if that is cut off, the mean is what it would be if it had just ended.
    """
    at_risk = whole.total() + cut_off.total()
    longer, mean, longest = 1.0, 0.0, 0.0
    for number in sorted({*whole, *cut_off}):
        longest = math.exp(number * _BIN) if number >= 0 else 0.0
        ended = longer * whole[number] / at_risk
        mean += ended * longest
        longer -= ended
        at_risk -= whole[number] + cut_off[number]
    return mean + longer * longest


def _bin(length: float) -> int:
    """-1 for what is below 1: no turn, no token, less than a millisecond."""
    return round(math.log(length) / _BIN) if length >= 1 else -1


def _lengths_of(episode: Episode) -> dict[str, float]:
    ended_at = episode.clock() if episode.trajectory is None else episode.stage_since
    return {
        "turns": episode.turns,
        "tokens": episode.generated_tokens,
        "seconds": 1000 * (ended_at - episode.admitted_at),
    }


def _bins_so_far(running: Collection[Episode]) -> dict[str, Counter[int]]:
    """Of all that run, at once: there may be ten thousands."""
    now = next((episode.clock() for episode in running), 0.0)
    return {
        "turns": _bins([episode.turns for episode in running]),
        "tokens": _bins([episode.generated_tokens for episode in running]),
        "seconds": _bins([1000 * (now - episode.admitted_at) for episode in running]),
    }


def _bins(lengths: Sequence[float]) -> Counter[int]:
    known = np.array(lengths, dtype=np.float64)
    bins = np.where(known >= 1, np.rint(np.log(known.clip(1)) / _BIN), -1).astype(int)
    # From -1 on.
    counts = np.bincount(bins + 1).tolist()
    return Counter({number - 1: count for number, count in enumerate(counts) if count})
