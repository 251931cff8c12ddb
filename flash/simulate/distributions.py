"""What a scenario says of quantities that vary: lengths in tokens, latencies in seconds."""

import bisect
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from flash.section import Section
from flash.simulate.replay import RecordedEpisode, played

_PARAMETERS: dict[str, tuple[str, ...]] = {
    "constant": ("mean",),
    "uniform": ("low", "high"),
    "normal": ("mean", "std"),
    "lognormal": ("mean", "sigma"),
    "pareto": ("mean", "shape"),
    "empirical": ("values",),
}
_FROM_RUN = ("run", "of")


class Distribution(Section):
    """A quantity that varies; a bare number is a constant.

    What is drawn is never below 0 nor above `at_most`, so those ends carry the probability of
    what lies beyond them.
    """

    kind: Literal["constant", "uniform", "normal", "lognormal", "pareto", "empirical"] = Field(
        description="its shape"
    )
    mean: float | None = Field(None, ge=0, description="before it is cut at its ends")
    std: float | None = Field(None, ge=0, description="of a normal one")
    sigma: float | None = Field(None, ge=0, description="of a lognormal one's logarithm")
    shape: float | None = Field(None, gt=1, description="of a Pareto one; near 1 the tail is heavy")
    low: float | None = Field(None, ge=0, description="of a uniform one")
    high: float | None = Field(None, ge=0, description="of a uniform one")
    values: tuple[float, ...] | None = Field(None, description="of an empirical one")
    run: Path | None = Field(None, description="a run's folder, whose episodes give the values")
    of: Literal["response_tokens", "turns", "env_step_s", "reward_s"] | None = Field(
        None, description="what to take from the run's episodes"
    )
    at_most: float = Field(math.inf, gt=0, description="what is above becomes this")

    @model_validator(mode="after")
    def _has_its_parameters(self) -> Self:
        given = {
            name
            for name in ("mean", "std", "sigma", "shape", "low", "high", "values", *_FROM_RUN)
            if getattr(self, name) is not None
        }
        wanted = set(_PARAMETERS[self.kind])
        if self.kind == "empirical" and given & set(_FROM_RUN):
            wanted = set(_FROM_RUN)
        if missing := sorted(wanted - given):
            raise ValueError(f"kind={self.kind} needs {' and '.join(missing)}")
        if extra := sorted(given - wanted):
            raise ValueError(
                f"kind={self.kind} takes {' and '.join(sorted(wanted))}: leave out "
                f"{' and '.join(extra)}"
            )
        if self.kind == "uniform" and self._number("low") > self._number("high"):
            raise ValueError(f"low={self.low:g} is above high={self.high:g}: exchange them")
        if self.values is not None and (not self.values or min(self.values) < 0):
            raise ValueError("values must be numbers of at least 0, and at least one")
        if self.run is not None:
            played(self.run)
        return self

    def _number(self, name: str) -> float:
        value = getattr(self, name)
        assert isinstance(value, float)
        return value

    def _observed(self) -> tuple[float, ...]:
        if self.values is not None:
            return self.values
        assert self.run is not None
        assert self.of is not None
        return observed(self.run, self.of)

    def sampler(self) -> "Sampler":
        """Draws from it."""
        return Sampler(self)


def _bare_number(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"kind": "constant", "mean": value}
    return value


Varying = Annotated[Distribution, BeforeValidator(_bare_number)]
"""A field that holds a distribution, or a number for a constant."""


def constant(value: float) -> Distribution:
    """What a bare number stands for."""
    return Distribution(kind="constant", mean=value)


class Sampler:
    """Draws from a distribution, and knows its moments."""

    def __init__(self, distribution: Distribution) -> None:
        self._of = distribution
        self._at_most = distribution.at_most
        self.values: Sequence[float] = ()
        if distribution.kind == "empirical":
            self.values = sorted(min(v, self._at_most) for v in distribution._observed())

    def draw(self, rng: random.Random) -> float:
        """One value, which uses up the same share of `rng` whatever the parameters are."""
        return self.quantile(rng.random())

    def quantile(self, share: float) -> float:
        """The value that a share of the draws is below."""
        of = self._of
        match of.kind:
            case "constant":
                value = of._number("mean")
            case "uniform":
                low = of._number("low")
                value = low + share * (of._number("high") - low)
            case "normal":
                value = of._number("mean") + of._number("std") * _normal_quantile(share)
            case "lognormal":
                sigma = of._number("sigma")
                mean = of._number("mean")
                value = mean * math.exp(sigma * _normal_quantile(share) - sigma**2 / 2)
            case "pareto":
                shape = of._number("shape")
                least = of._number("mean") * (shape - 1) / shape
                value = least * (1 - share) ** (-1 / shape)
            case "empirical":
                value = self.values[int(share * len(self.values))]
        return min(max(value, 0.0), self._at_most)

    def mean(self) -> float:
        """As it is drawn, cut ends included; by quantiles, good to a percent."""
        if self.values:
            return fmean(self.values)
        return fmean(self._grid())

    def mean_of_largest(self, count: int) -> float:
        """The expected largest of `count` draws."""
        return fmean(self.quantile(u ** (1 / count)) for u in _MIDPOINTS)

    def share_below(self, value: float) -> float:
        """The share of draws that are not above the value."""
        return bisect.bisect_right(self._grid(), value) / len(_MIDPOINTS)

    def _grid(self) -> list[float]:
        return [self.quantile(u) for u in _MIDPOINTS]


def _normal_quantile(share: float) -> float:
    return _STANDARD_NORMAL.inv_cdf(max(share, 1e-300))


_STANDARD_NORMAL = NormalDist()
_MIDPOINTS = tuple((i + 0.5) / 4000 for i in range(4000))


def observed(run: Path, of: str) -> tuple[float, ...]:
    """That quantity of each episode of the run that came to its end; per turn where it is so."""
    take: dict[str, Callable[[RecordedEpisode], float]] = {
        "response_tokens": lambda episode: episode.generated_tokens / episode.turns,
        "turns": lambda episode: float(episode.turns),
        "env_step_s": lambda episode: episode.env_s / episode.turns,
        "reward_s": lambda episode: episode.reward_s,
    }
    return tuple(map(take[of], played(run)))
