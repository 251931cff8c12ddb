"""Tiny random models of the families that transformers has."""

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Model: Any = transformers.AutoModelForCausalLM
WINDOW = 8
# For those that are without otherwise.
WINDOWS: dict[str, dict[str, Any]] = {
    "phimoe": {"sliding_window": WINDOW},
    "qwen2_moe": {
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}

# By the names that configurations have for the same things; one takes those that it knows.
SIZES: dict[str, Any] = {
    "vocab_size": 97, "vocab_size_per_layer_input": 97, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32, "d_model": 32, "n_embd": 32, "attention_hidden_size": 32, "lru_width": 32,
    "embedding_size": 32, "hidden_size_per_layer_input": 8,
    "intermediate_size": 64, "d_ff": 64, "ffn_dim": 64, "dim_ff": 64, "ffn_hidden_size": 64,
    "dense_intermediate_size": 64, "decoder_ffn_dim": 64, "encoder_ffn_dim": 64,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2,
    "encoder_layers": 1, "num_dense_layers": 1,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "dim_head": 8,
    "rotary_dim": 4,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 256, "n_positions": 256, "n_ctx": 256, "max_seq_len": 256,
    "max_sequence_length": 256,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "n_group": 1,
    "topk_group": 1,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2,
    "mamba_n_groups": 1, "state_size": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 1,
}  # fmt: skip
_LATENT = {"num_key_value_heads": 4}
# What a family can't do without, or can't do with.
SETTINGS: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "longcat_flash": _LATENT,
    "minicpm3": _LATENT,
    "youtu": _LATENT,
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma3n_text": {
        "num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.0, 0.0], "laurel_rank": 4,
        "altup_num_inputs": 2, "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]], "window_size": WINDOW, "num_heads": 4,
    },
    "phimoe": {"sliding_window": None},
    "qwen2_moe": {"use_sliding_window": False, "layer_types": ["full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def save_family(folder: Path, kind: str, **settings: Any) -> Any:
    """A model of that type in a folder, with windows where it can have them and one layer of each
    kind; its configuration."""
    made = _config(kind, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Model.from_config(made, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:  # far from uniform, so that a wrong context shows
                    parameter.normal_(0, 0.25)
                elif "A_log" not in name and "dt_bias" not in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
    return made


def _config(kind: str, settings: dict[str, Any]) -> Any:
    config_class: Any = CONFIG_MAPPING[kind]
    usual = config_class()
    text = usual.get_text_config()
    aliases = type(text).attribute_map
    known = set(inspect.signature(type(text).__init__).parameters) | text.to_dict().keys()
    sizes = {name: size for name, size in SIZES.items() if name in known | aliases.keys()}
    sizes = {name: size for name, size in sizes.items() if aliases.get(name) not in sizes}
    if kinds := _kinds_of_layers(text):
        sizes |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    sizes |= SETTINGS.get(kind, {}) | settings
    if text is usual:
        return config_class(**sizes)
    part = next(name for name in usual.sub_configs if getattr(usual, name) is text)
    return config_class(**{part: sizes})


def _kinds_of_layers(text: Any) -> list[str]:
    """One of each, and two layers at least; none if the type does not let one say."""
    name = type(text).attribute_map.get("layer_types", "layer_types")
    if isinstance(inspect.getattr_static(type(text), name, None), property):
        return []
    kinds = list(dict.fromkeys(getattr(text, "layer_types", None) or ()))
    if "sliding_window" in text.to_dict() and kinds == ["full_attention"]:
        kinds = ["full_attention", "sliding_attention"]
    return kinds * 2 if len(kinds) == 1 else kinds
