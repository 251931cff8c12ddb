"""Norms, rotary positions and SwiGLU as one kernel each, on a GPU, by liger-kernel.

Each is several kernels in transformers, over activations in float32; a pass of a small model waits
for their launches, and a large one for the memory.
"""

import importlib.util
import logging
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flash.trainer.scorer import TokenScorer
from flash.trainer.self_test import check_layers

logger = logging.getLogger(__name__)

_LIMIT = 1e-3  # of logprobs, in float32


def fuse(scorer: TokenScorer) -> bool:
    """Whether the model computes with fused kernels from now on.

    ValueError if its logprobs are not what they were. It computes in float32 here, and evaluates.
    """
    model: Any = scorer.model
    if not can_fuse(model):
        return False
    before = check_layers(scorer)
    fuse_layers(model)
    after = check_layers(scorer)
    gap = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    if not gap <= _LIMIT:  # nan is none either
        raise ValueError(
            f"model_type={model.config.model_type!r} computes other logprobs with liger-kernel, by "
            f"{gap:.2g}: it would not learn from what was sampled; uninstall liger-kernel, or "
            f"install another version"
        )
    return True


def can_fuse(model: Any) -> bool:
    """Whether it is on a GPU, and liger-kernel is installed and knows it."""
    if model.device.type != "cuda":
        return False
    if importlib.util.find_spec("liger_kernel") is None:
        logger.info("liger-kernel is not installed: norms, positions and SwiGLU are not fused")
        return False
    from liger_kernel.transformers import monkey_patch  # noqa: PLC0415 (it is optional)

    kind = model.config.model_type
    if kind not in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        logger.info("liger-kernel does not know model_type=%s: nothing is fused", kind)
        return False
    return True


def fuse_layers(model: Any) -> None:
    """This model's alone: others of its type in this process stay what they are on a CPU."""
    from liger_kernel.transformers import monkey_patch  # noqa: PLC0415

    of_type = sys.modules[type(model).__module__]
    before = dict(vars(of_type))
    # The loss is ours, and so is what computes it from the last hidden states.
    monkey_patch._apply_liger_kernel_to_instance(
        model, cross_entropy=False, fused_linear_cross_entropy=False
    )
    for name, plain in before.items():
        # liger-kernel also puts its own where the next model of the type would find them.
        if (fused := vars(of_type)[name]) is not plain:
            setattr(of_type, name, plain if isinstance(plain, type) else _by_place(fused, plain))


def _by_place(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors, which a model of either kind looks up in its module."""

    def call(first: Tensor, *more: Any, **settings: Any) -> Any:
        return (fused if first.is_cuda else plain)(first, *more, **settings)

    return call
