"""From an objective's settings to its function."""

from collections.abc import Callable
from functools import partial

from flash import registry
from flash.trainer.objectives import clipped, weighted
from flash.trainer.objectives.settings import Function, ObjectiveSettings
from flash.trainer.objectives.token_batch import Objective, TokenBatch, TokenLoss


def supervised(batch: TokenBatch) -> TokenLoss:
    """-log π: cross-entropy; the mask may hold any weights."""
    return TokenLoss(loss_T=-batch.logprobs_T)


OBJECTIVES: dict[str, Callable[..., TokenLoss]] = {
    "vanilla": weighted.vanilla,
    "opmd": weighted.opmd,
    "tis": weighted.tis,
    "cispo": weighted.cispo,
    "topr": weighted.topr,
    "masked_is": weighted.masked_is,
    "kimi15": weighted.kimi15,
    "ppo": clipped.ppo,
    "decoupled_ppo": clipped.decoupled_ppo,
    "icepop": clipped.icepop,
    "gspo": clipped.gspo,
    "supervised": supervised,
}


def make_objective(settings: ObjectiveSettings) -> Objective:
    """The objective of that name, with its settings filled in; or one of the user's own."""
    if isinstance(settings, Function):
        own: Objective = registry.function(settings.run, "trainer.objective.run")
        return own
    return partial(OBJECTIVES[settings.name], **settings.parameters())
