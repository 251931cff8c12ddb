"""A small model with the settings of a large one, and weights drawn at random: what the type makes
of packed sequences shows on it in a second, before anything is started with the large one.

What attention depends on stays as it is: the types of layers, positions, the width of a head,
whether heads share keys. There is one layer of each type, and windows are as short as the texts
that are compared.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flash.trainer.attention import PACKED_ATTENTION
from flash.trainer.scorer import TokenScorer
from flash.trainer.self_test import LIMIT, WIDEST_WINDOW, WINDOWS, differs, packed_gaps

# By the names that configurations have for the same things.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_HIDDEN = ("hidden_size", "d_model", "n_embd", "embedding_size", "word_embed_proj_dim")
_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")
_AT_MOST = {
    "intermediate_size": 64, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64, "dense_intermediate_size": 64, "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 64, "ffn_dim": 64, "n_inner": 64, "dff": 64,
    "hidden_size_per_layer_input": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "num_kv_shared_layers": 0,
}  # fmt: skip

_TOKENS, _FEW_HEADS, _FEW_LAYERS, _SHORT_WINDOW = 512, 4, 2, 8
_MOST_PARAMETERS = 60_000_000  # more would take longer to draw than all of this is worth
_GAIN = 1.5  # of a matrix: a wrong context shows, and rounding does not grow


def check_small_copy(config: Any) -> None:
    """ValueError if a small model of that configuration computes other logprobs packed than alone.

    Of a configuration that can't be made small nothing is told: the ranks will see.
    """
    try:
        gaps = packed_gaps(TokenScorer(_drawn(_smaller(config))))
    except Exception:  # the boundary to transformers' classes, whose sizes depend on each other
        return
    for tokens, gap in gaps:
        if LIMIT < gap < math.inf:
            seen_in = " in a small random model of it"
            raise ValueError(differs(config, tokens, gap, seen_in=seen_in))


def _smaller(config: Any) -> Any:
    """A configuration of the same type."""
    parts = {name: getattr(config, name) for name in config.sub_configs}
    settings = config.to_dict() if parts else _smaller_part(config)
    settings |= {name: _smaller_part(part) for name, part in parts.items() if part is not None}
    return type(config).from_dict(settings)


def _smaller_part(part: Any) -> dict[str, Any]:
    settings: dict[str, Any] = part.to_dict()
    layers, heads, hidden = (_first(settings, names) for names in (_LAYERS, _HEADS, _HIDDEN))
    width = settings.get("head_dim") or hidden // heads
    key_heads = settings.get("num_key_value_heads") or heads
    kept = _one_of_each(settings.get("layer_types") or [], layers)
    sizes = (
        dict.fromkeys(_LAYERS, len(kept))
        | dict.fromkeys(_HEADS, _FEW_HEADS)
        | dict.fromkeys(_HIDDEN, _FEW_HEADS * width)
        | {"num_key_value_heads": max(1, _FEW_HEADS * key_heads // heads)}
    )
    for name, value in settings.items():
        if isinstance(value, list) and len(value) == layers:
            settings[name] = [_at_most(name, value[number]) for number in kept]
        elif value is not None:
            settings[name] = sizes.get(name, _at_most(name, value))
    return settings


def _first(settings: dict[str, Any], names: Sequence[str]) -> int:
    size: int = next(settings[name] for name in names if settings.get(name))
    return size


def _one_of_each(types: Sequence[str], layers: int) -> list[int]:
    """The first layers, and the first of each type, by their numbers."""
    return sorted({*range(min(layers, _FEW_LAYERS)), *map(types.index, types)})


def _at_most(name: str, value: Any) -> Any:
    if isinstance(value, list):
        return [_at_most(name, each) for each in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if name in WINDOWS:
        return min(value, _SHORT_WINDOW) if value <= WIDEST_WINDOW else value
    if name in _VOCABULARIES:
        return min(value, _TOKENS)
    if name.endswith("_token_id"):
        return min(value, _TOKENS - 1)
    return min(value, _AT_MOST.get(name, value))


@torch.no_grad()
def _drawn(config: Any) -> Any:
    """A model of the configuration. ValueError if it is no small one."""
    model_class: Any = AutoModelForCausalLM  # its types are not published
    make = functools.partial(
        model_class.from_config, config, dtype=torch.float32, attn_implementation=PACKED_ATTENTION
    )
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in make().parameters())
    if size > _MOST_PARAMETERS:
        raise ValueError(f"{size} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, _GAIN / math.sqrt(parameter.shape[-1]))
    return model
