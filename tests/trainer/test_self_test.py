"""Packed and plain forward of a model, compared at its start."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flash.trainer.attention import PACKED_ATTENTION
from flash.trainer.scorer import TokenScorer
from flash.trainer.self_test import check_packed, texts
from tests.packed import load_packed

Model: Any = transformers.AutoModelForCausalLM
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 256,
    "initializer_range": 0.3,
}  # fmt: skip


def scorer_of(folder: Path, kind: str, **settings: Any) -> TokenScorer:
    config = transformers.AutoConfig.for_model(kind, **SIZES | settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        Model.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return TokenScorer(load_packed(folder))


WINDOWS = [
    ("mistral", {"sliding_window": 8}),
    ("mixtral", {"sliding_window": 8, "num_local_experts": 2}),
    ("phi3", {"sliding_window": 8}),
    ("starcoder2", {"sliding_window": 8}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
    ("gemma3_text", {"sliding_window": 8, "sliding_window_pattern": 2}),
    ("exaone4", {"sliding_window": 100, "sliding_window_pattern": 2}),
]


@pytest.mark.parametrize(("kind", "settings"), WINDOWS)
def test_packed_sequences_keep_a_window_in_whatever_way_it_is_said(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    check_packed(scorer_of(tmp_path, kind, **settings))


def test_a_model_that_looks_ahead_is_no_language_model(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError,
        match=r"model_type='bert' computes other logprobs in packed sequences than alone, by .* at "
        r"the end of 64 tokens \(config\.json has no windows\): it would not learn from",
    ):
        check_packed(scorer_of(tmp_path, "bert"))


def test_what_a_model_raises_is_told_with_its_type(tmp_path: Path) -> None:
    scorer = scorer_of(tmp_path, "llama")
    model: Any = scorer.model.base_model
    forward = model.forward

    def fails_alone(*args: Any, **settings: Any) -> Any:
        if "packing" not in settings:
            raise RuntimeError("sizes differ")
        return forward(*args, **settings)

    def fails(*args: Any, **settings: Any) -> Any:
        raise KeyError("heads")

    model.forward = fails_alone
    with pytest.raises(ValueError, match=r"'llama' can't compute a forward pass.*sizes differ"):
        check_packed(scorer)
    model.forward = fails
    with pytest.raises(ValueError, match=r"'llama' can't compute packed sequences.*heads"):
        check_packed(scorer)


def test_a_lack_of_memory_is_no_fault_of_the_models(tmp_path: Path) -> None:
    scorer = scorer_of(tmp_path, "llama")
    model: Any = scorer.model.base_model
    model.forward = lambda **_: torch.empty(1 << 60)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        check_packed(scorer)


def test_the_check_leaves_attention_as_it_was(tmp_path: Path) -> None:
    scorer = scorer_of(tmp_path, "llama")
    check_packed(scorer)
    assert scorer.model.config._attn_implementation == PACKED_ATTENTION  # type: ignore[union-attr]


def test_a_layer_whose_attention_is_its_own_is_counted(tmp_path: Path) -> None:
    scorer = scorer_of(tmp_path, "llama")
    scorer.model.config.num_hidden_layers = 3  # type: ignore[union-attr]
    with pytest.raises(
        ValueError, match=r"2 of the 3 layers of model_type='llama' leave attention"
    ):
        check_packed(scorer)


@pytest.mark.parametrize(
    ("settings", "at_most", "lengths"),
    [
        ({}, None, [64, 5, 33]),
        ({"sliding_window": 100}, None, [116, 5, 33]),
        ({"sliding_window": 100}, 40, [40, 5, 33]),
        ({"sliding_window": 100, "max_position_embeddings": 20}, None, [20, 5]),
        ({"sliding_window": 100_000}, None, [64, 5, 33]),
        ({"max_position_embeddings": -1}, None, [64, 5, 33]),
    ],
)
def test_texts_are_longer_than_a_window_as_far_as_they_may_be(
    settings: dict[str, Any], at_most: int | None, lengths: list[int]
) -> None:
    config = transformers.MistralConfig(**{"sliding_window": None, "vocab_size": 97} | settings)
    made = texts(config, at_most=at_most)
    assert [len(text) for text in made] == lengths
    assert all(0 <= token < 97 for text in made for token in text)
    assert len({tuple(text[:5]) for text in made}) == len(made)
