"""What a model's sizes say of the memory that training it takes, and what is refused for it."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from flash.trainer.config import TrainerConfig
from flash.trainer.memory import ModelSize, check_memory, rank_memory, size_of
from flash.trainer.model_files import empty_model

GB = 10**9
SIZE = ModelSize(parameters=100, trained=100, root=20, layer=40, tensor=15)


def billions(folder: Path) -> str:
    """A model of 0.94 billion parameters, without its files' weights."""
    transformers.LlamaConfig(
        vocab_size=32_000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=13,
        num_attention_heads=16, num_key_value_heads=16, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def config(**settings: Any) -> TrainerConfig:
    return TrainerConfig.model_validate(settings)


def test_a_model_is_its_layers_and_what_is_outside_of_them() -> None:
    model = empty_model(
        transformers.LlamaConfig(
            vocab_size=100, hidden_size=8, intermediate_size=16, num_hidden_layers=3,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
        ),
        torch.float32,
    )  # fmt: skip
    layer = 8 * 8 * 2 + 2 * 8 * 4 + 3 * 8 * 16 + 2 * 8
    root = 2 * 100 * 8 + 8
    assert size_of(model) == ModelSize(
        parameters=3 * layer + root, trained=3 * layer + root, root=root, layer=layer, tensor=800
    )
    model.lm_head.weight.requires_grad_(False)
    assert size_of(model).trained == 3 * layer + root - 800


def test_weights_gradients_and_moments_are_shared_out_and_layers_are_gathered() -> None:
    memory = rank_memory(SIZE, shards=4, half=False)
    assert (memory.weights, memory.gradients, memory.moments) == (100, 100, 200)
    assert memory.gathered == 4 * (20 + 3 * 40)
    assert memory.backward == 4 * 20 + (4 + 8) * 40
    assert memory.load == 100 + memory.gathered
    assert memory.step == 400 + memory.gathered + memory.backward
    assert memory.checkpoint == 2 * 300
    assert memory.exported(7) == 300 + 7 + 2 * 4 * 15


def test_in_half_precision_what_is_gathered_is_half_but_for_the_first_comparison() -> None:
    whole, half = (rank_memory(SIZE, shards=4, half=half) for half in (False, True))
    assert half.kept == whole.kept
    assert half.load == whole.load
    assert half.gathered == whole.gathered / 2


def test_frozen_weights_are_as_layers_compute_and_have_no_gradient() -> None:
    adapted = ModelSize(parameters=100, trained=10, root=20, layer=40, tensor=15)
    assert rank_memory(adapted, shards=1, half=True).kept == 90 * 2 + 10 * 16
    assert rank_memory(adapted, shards=1, half=False).kept == 90 * 4 + 10 * 16


def test_an_embedding_that_is_larger_than_layers_decides_what_the_backward_pass_takes() -> None:
    size = ModelSize(parameters=1000, trained=1000, root=900, layer=50, tensor=900)
    assert rank_memory(size, shards=1, half=True).backward == (2 + 4) * 900


@pytest.mark.parametrize(
    ("settings", "gpu_gb", "host_gb", "ranks_here"),
    [
        ({}, 16, 1, 1),
        ({"ranks": 2}, 8, 1, 2),
        ({}, None, 16, 1),
        ({"ranks": 4}, None, 8, 2),  # two nodes
        ({"lora": {"rank": 4}}, 4.2, 1, 1),
        ({"advantages": "gae"}, 32, 1, 1),
    ],
)
def test_what_fits_is_not_refused(
    settings: Any, gpu_gb: float | None, host_gb: float, ranks_here: int, tmp_path: Path
) -> None:
    check_memory(
        billions(tmp_path),
        config(**settings),
        gpu_bytes=None if gpu_gb is None else int(gpu_gb * GB),
        host_bytes=int(host_gb * GB),
        ranks_here=ranks_here,
    )


@pytest.mark.parametrize(
    ("settings", "gpu_gb", "host_gb", "ranks_here", "why"),
    [
        (
            {},
            14,
            1000,
            1,
            "trainer.ranks=1 keeps 15.0 GB to train them, besides activations, and there are 14.0 "
            "GB for it: take more trainer.ranks or adapters (trainer.lora.rank=16) or a smaller "
            "model",
        ),
        (
            {"ranks": 4, "shard_size": 2},
            7,
            1000,
            4,
            "keeps 7.5 GB to train them, besides activations, and there are 7.0 GB for it: take a "
            "larger trainer.shard_size or adapters (trainer.lora.rank=16) or a smaller model",
        ),
        (
            {"ranks": 2},
            None,
            14,
            2,
            "trainer.ranks=2 keeps 7.5 GB to train them, besides activations, and there are 7.0 GB "
            "for it: take adapters (trainer.lora.rank=16) or a smaller model",
        ),
        ({"lora": {"rank": 4}}, 3, 1000, 1, "3.0 GB for it: take more trainer.ranks or a smaller"),
        ({"advantages": "gae"}, 20, 1000, 1, "keeps 30.0 GB"),
    ],
)
def test_a_model_that_ranks_have_no_memory_for_is_refused_with_what_would_help(
    settings: Any, gpu_gb: float | None, host_gb: float, ranks_here: int, why: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as refused:
        check_memory(
            billions(tmp_path),
            config(**settings),
            gpu_bytes=None if gpu_gb is None else int(gpu_gb * GB),
            host_bytes=int(host_gb * GB),
            ranks_here=ranks_here,
        )
    told = str(refused.value)
    assert told.startswith(f"model={str(tmp_path)!r} has 0.9 billion parameters, of which each of")
    assert why in told
