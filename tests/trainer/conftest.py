"""Tiny models of real architectures, and samples to train them on.

The fixtures are functions, because test files can't import one another here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from flash.fakes import fake_sample
from flash.types import Sample

VOCABULARY = 97


def _save_model(directory: Path, kind: str = "llama", *, tied: bool = True) -> Path:
    """A random model with grouped keys; Qwen2 has biases as well."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,  # far from uniform, so that a wrong context shows
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    config_class = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind]
    config: Any = config_class(**settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    return directory


def _samples_of(count: int, *, seed: int = 0, version: int = 0) -> list[Sample]:
    """Samples of 5 to 40 tokens, the later half of each sampled by `version` or the one before."""
    rng = np.random.default_rng(seed)
    samples = []
    for episode in range(count):
        length = int(rng.integers(5, 41))
        mask = (np.arange(length) >= length // 2).astype(np.float32)
        samples.append(
            fake_sample(
                rng.integers(0, VOCABULARY, length),
                mask,
                logprobs=(mask * rng.uniform(-6, -3, length)).astype(np.float32),
                versions=np.where(mask > 0, version - rng.integers(0, 2, length), -1),
                advantage=float(rng.normal()),
                episode=episode,
            )
        )
    return samples


def _reference_logprobs(model: Any, token_ids: list[int]) -> list[float]:
    """Logprobs of `token_ids[1:]`, from a plain forward pass of transformers in float64."""
    with torch.no_grad():
        logits_LV = model(torch.tensor([token_ids])).logits[0, :-1].double()
    targets_L = torch.tensor(token_ids[1:])[:, None]
    logprobs: list[float] = logits_LV.log_softmax(-1).gather(-1, targets_L)[:, 0].tolist()
    return logprobs


@pytest.fixture(scope="session")
def save_model() -> Callable[..., Path]:
    return _save_model


@pytest.fixture(scope="session")
def samples_of() -> Callable[..., list[Sample]]:
    return _samples_of


@pytest.fixture(scope="session")
def reference_logprobs() -> Callable[[Any, list[int]], list[float]]:
    return _reference_logprobs
