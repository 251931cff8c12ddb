"""What a model's sizes say of the memory that training it takes."""

import torch
import transformers
from rank_memory import ModelSize, rank_memory, size_of

from flash.trainer.model_files import empty_model

SIZE = ModelSize(parameters=100, trained=100, root=20, layer=40, tensor=15)


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
