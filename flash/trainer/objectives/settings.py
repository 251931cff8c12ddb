"""The settings of each objective, one small model each, found by name; imports no torch.

trainer:
  objective: {name: tis, cap: 2.0}     # or just: tis
"""

from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from flash import registry
from flash.section import Section

Aggregation = Literal["token_mean", "sequence_mean", "sequence_sum", "fixed_length"]
Estimator = Literal["k1", "k2", "k3"]

_CLIP_LOW = "the clip begins at a ratio of 1 - this"
_CLIP_HIGH = "the clip begins at a ratio of 1 + this"
_ALLOW_STALE = "train on stale tokens all the same, to study what that does"


class ObjectiveSettings(Section):
    """What the settings of all objectives have.

    Class variables: `cannot_correct` says why the objective is wrong for tokens that other weights
    sampled (empty if it can); `aggregation` is how its losses are added up unless told otherwise.
    """

    cannot_correct: ClassVar[str] = ""
    aggregation: ClassVar[Aggregation] = "token_mean"

    name: Any

    @property
    def needs_proximal(self) -> bool:
        """Whether the logprobs at the start of the step are wanted: one more forward pass."""
        return False

    @property
    def allows_stale(self) -> bool:
        """Whether stale tokens are corrected, or wanted uncorrected."""
        return not self.cannot_correct or bool(getattr(self, "allow_stale", False))

    def parameters(self) -> dict[str, Any]:
        """The keyword arguments of the objective's function."""
        return self.model_dump(exclude={"name", "allow_stale"})


class Vanilla(ObjectiveSettings):
    """The plain policy gradient."""

    cannot_correct = "-A·log π has no term that depends on who sampled"
    name: Literal["vanilla"] = "vanilla"
    allow_stale: bool = Field(False, description=_ALLOW_STALE)


class Opmd(ObjectiveSettings):
    """Online policy mirror descent as in Trinity-RFT."""

    cannot_correct = "-A·log π/(1 + tau) has no term that depends on who sampled"
    name: Literal["opmd"] = "opmd"
    tau: float = Field(1.0, ge=0, description="strength of the regularisation to the present π")
    allow_stale: bool = Field(False, description=_ALLOW_STALE)


class Tis(ObjectiveSettings):
    """Truncated importance sampling."""

    name: Literal["tis"] = "tis"
    cap: float = Field(2.0, gt=0, description="of the weight π/π_behaviour of a token")


class Cispo(ObjectiveSettings):
    """Clipped importance weights on log π, as in MiniMax-M1."""

    name: Literal["cispo"] = "cispo"
    clip_low: float = Field(1.0, gt=0, le=1, description="the weight is at least 1 - this")
    clip_high: float = Field(0.28, gt=0, description="the weight is at most 1 + this")


class Topr(ObjectiveSettings):
    """Tapered off-policy REINFORCE."""

    name: Literal["topr"] = "topr"
    granularity: Literal["sequence", "token"] = Field(
        "sequence", description="what the weight of a negative sample is the ratio of"
    )
    sign: Literal["advantage", "reward"] = Field(
        "advantage", description="positive is what has more than 0 of this"
    )


class MaskedIs(ObjectiveSettings):
    """Importance weights, with those out of bounds left out instead of cut."""

    name: Literal["masked_is"] = "masked_is"
    granularity: Literal["token", "geometric", "sequence"] = Field(
        "token", description="whose ratio is judged: the token's, the sequence's mean, its product"
    )
    low: float = Field(0.5, ge=0, description="ratios below are left out")
    high: float = Field(2.0, gt=0, description="ratios above are left out")

    @model_validator(mode="after")
    def _bounds_hold_one(self) -> Self:
        _check_bounds(self.low, self.high)
        return self


class Kimi15(ObjectiveSettings):
    """The squared log-ratio as a regulariser, as in Kimi k1.5."""

    name: Literal["kimi15"] = "kimi15"
    tau: float = Field(0.1, gt=0, description="strength of the pull back to the sampler")
    granularity: Literal["sequence", "token"] = Field(
        "sequence", description="whose log-ratio is squared"
    )


class Ppo(ObjectiveSettings):
    """PPO's clip on π/π_behaviour."""

    name: Literal["ppo"] = "ppo"
    clip_low: float = Field(0.2, gt=0, lt=1, description=_CLIP_LOW)
    clip_high: float = Field(0.28, gt=0, description=_CLIP_HIGH)
    dual_clip: float | None = Field(
        3.0, gt=1, description="bounds the loss of a token with A < 0 by -A times this; null: none"
    )


class DecoupledPpo(ObjectiveSettings):
    """PPO's clip on π/π_prox, weighted by π_prox/π_behaviour."""

    name: Literal["decoupled_ppo"] = "decoupled_ppo"
    clip_low: float = Field(0.2, gt=0, lt=1, description=_CLIP_LOW)
    clip_high: float = Field(0.28, gt=0, description=_CLIP_HIGH)
    max_behaviour_weight: float = Field(
        2.0, ge=1, description="cap of the weight π_prox/π_behaviour of a token"
    )
    proximal: Literal["recomputed", "interpolated"] = Field(
        "recomputed", description="π_prox by a forward pass, or estimated from versions without one"
    )

    @property
    def needs_proximal(self) -> bool:
        return self.proximal == "recomputed"


class IcePop(ObjectiveSettings):
    """Decoupled PPO that leaves tokens out whose π_prox/π_behaviour is out of bounds."""

    name: Literal["icepop"] = "icepop"
    low: float = Field(0.5, ge=0, description="ratios below are left out")
    high: float = Field(5.0, gt=0, description="ratios above are left out")
    clip_low: float = Field(0.2, gt=0, lt=1, description=_CLIP_LOW)
    clip_high: float = Field(0.28, gt=0, description=_CLIP_HIGH)

    @property
    def needs_proximal(self) -> bool:
        return True

    @model_validator(mode="after")
    def _bounds_hold_one(self) -> Self:
        _check_bounds(self.low, self.high)
        return self


class Gspo(ObjectiveSettings):
    """PPO's clip on the geometric mean of a sequence's ratios."""

    aggregation = "sequence_mean"
    name: Literal["gspo"] = "gspo"
    clip_low: float = Field(3e-4, gt=0, lt=1, description=_CLIP_LOW)
    clip_high: float = Field(4e-4, gt=0, description=_CLIP_HIGH)


class Supervised(ObjectiveSettings):
    """Cross-entropy; for warm starts."""

    cannot_correct = "it imitates every sample, whatever its reward"
    name: Literal["supervised"] = "supervised"


class Function(ObjectiveSettings):
    """A loss of your own; whether it is right for stale tokens is yours to know."""

    name: Literal["function"] = "function"
    run: str = Field(description="module:name, a function of a TokenBatch that gives a TokenLoss")
    proximal: bool = Field(
        False, description="whether it uses proximal_logprobs_T: one more forward pass"
    )

    @property
    def needs_proximal(self) -> bool:
        return self.proximal

    @model_validator(mode="after")
    def _is_a_function(self) -> Self:
        registry.function(self.run, "trainer.objective.run", of="a TokenBatch")
        return self


class KlSettings(Section):
    """Keeps the policy near a reference policy."""

    coefficient: float = Field(0.0, ge=0, description="of KL(π ‖ π_ref); 0: no reference model")
    estimator: Estimator = Field("k3", description="x, x²/2, or exp(-x) - 1 + x; x = log π/π_ref")
    place: Literal["loss", "reward"] = Field(
        "loss", description="added to the loss, or taken from each token's return"
    )
    corrected: bool = Field(
        True, description="in the loss: times π/π_behaviour, right for stale tokens too"
    )
    reference: str | None = Field(
        None, description="the reference: a directory or hub name; null: the model at the start"
    )

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.reference is not None and not self.coefficient:
            raise ValueError(
                f"trainer.kl.reference={self.reference} with coefficient=0 does nothing: give "
                f"trainer.kl.coefficient, for example 0.001, or leave the reference out"
            )
        if self.estimator == "k1" and self.place == "loss" and not self.corrected:
            raise ValueError(
                "trainer.kl.estimator=k1 with place=loss and corrected=false: the mean of its "
                "gradient is 0, so it does nothing but add noise: use corrected=true, k2 or k3, "
                "or place=reward"
            )
        return self


AnyObjective = Annotated[
    Vanilla
    | Opmd
    | Tis
    | Cispo
    | Topr
    | MaskedIs
    | Kimi15
    | Ppo
    | DecoupledPpo
    | IcePop
    | Gspo
    | Supervised
    | Function,
    Field(discriminator="name"),
]

SETTINGS: dict[str, type[ObjectiveSettings]] = {
    kind.model_fields["name"].default: kind
    for kind in get_args(get_args(AnyObjective)[0])
    if kind is not Function
}
"""Of the objectives that are here."""


def _check_bounds(low: float, high: float) -> None:
    if not low < 1 < high:
        raise ValueError(
            f"trainer.objective.low={low:g} and high={high:g} must have 1 between them: it is the "
            f"ratio of a token that nothing is wrong with"
        )
