"""A model's weights as its files hold them: their names, and what is one tensor there.

transformers computes with a layer's experts as one tensor; files have each by itself, and servers
look for those. Here it is as `save_pretrained` does it, for a few tensors at a time.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)


def parts_of(model: Any, names: Iterable[str]) -> list[list[str]]:
    """The model's names, those together that are one tensor in its files."""
    # What its own files needed, as transformers knows after it has read them.
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = get_model_conversion_mapping(model, add_legacy=False)
    reverse: list[Any] = [conversion.reverse_transform() for conversion in conversions[::-1]]
    renamings = [each for each in reverse if isinstance(each, WeightRenaming)]
    converters = [each for each in reverse if isinstance(each, WeightConverter)]
    parts: dict[str, list[str]] = defaultdict(list)
    for name in names:
        parts[rename_source_key(name, renamings, converters, reverse=True)[0]].append(name)
    return list(parts.values())


def as_stored(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the model's names, all of each part, as its files hold them."""
    untyped_revert: Any = revert_weight_conversion
    stored: dict[str, Tensor] = untyped_revert(model, tensors)
    return stored
