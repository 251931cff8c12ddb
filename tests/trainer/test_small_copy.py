"""What packing changes in a type of models, seen on a small random one of the same settings."""

from typing import Any

import pytest
import transformers

from flash.trainer.small_copy import check_small_copy

pytestmark = pytest.mark.slow

LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 32.0}


# The sizes are those of published models: nothing as large is made.
@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        (
            "qwen2_moe",
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 12},
            "sliding_window=4096, rope",
        ),
        ("phimoe", {"sliding_window": 2047}, "sliding_window=2047, rope"),
        ("modernbert-decoder", {}, "sliding_window="),
        ("roberta", {"is_decoder": True}, r"is_decoder=True\)"),
        ("bert", {}, r"no windows\)"),
    ],
)
def test_what_packing_would_change_is_told_with_the_settings_that_were_given(
    kind: str, settings: dict[str, Any], told: str
) -> None:
    config = transformers.AutoConfig.for_model(kind, **settings)
    with pytest.raises(
        ValueError,
        match=rf"model_type='{kind}' computes other logprobs in packed sequences than alone, by .* "
        rf"tokens in a small random model of it \(config\.json has .*{told}",
    ):
        check_small_copy(config)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"rope_parameters": LLAMA_3, "num_key_value_heads": 8, "vocab_size": 128_256}),
        ("phi3", {"rope_parameters": LONG | {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
                  "original_max_position_embeddings": 4096, "pad_token_id": 0}),
        ("mistral", {"sliding_window": 4096}),
        ("gemma3_text", {"head_dim": 128, "num_attention_heads": 32, "num_key_value_heads": 16}),
        ("qwen3_moe", {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128}),
        ("deepseek_v3", {}),
        ("qwen2_moe", {}),
        ("phimoe", {"sliding_window": 131_072}),  # longer than what is trained
        ("gpt2", {}),
    ],
)  # fmt: skip
def test_what_packing_leaves_as_it_is_is_taken(kind: str, settings: dict[str, Any]) -> None:
    check_small_copy(transformers.AutoConfig.for_model(kind, **settings))


def test_of_what_can_not_be_made_small_nothing_is_told() -> None:
    unknown: Any = transformers.T5Config()  # no causal language model
    check_small_copy(unknown)
