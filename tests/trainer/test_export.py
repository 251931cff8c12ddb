"""What is written of a model's weights, without ranks; tests of the trainer have those."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flash.trainer.export import layout, whole_tensors, write_weights
from tests.families import save_family

SaveModel = Callable[..., Path]
Model: Any = AutoModelForCausalLM


def written(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("tied", [True, False])
def test_the_files_are_a_checkpoint_with_tied_weights_once(
    tied: bool, save_model: SaveModel, tmp_path: Path
) -> None:
    model = Model.from_pretrained(save_model(tmp_path / "model", "qwen2", tied=tied))
    (tmp_path / "out").mkdir()
    write_weights(model, tmp_path / "out", dtype=torch.float32, write=True, file_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 22_000 for file in files)
    assert ("lm_head.weight" in written(tmp_path / "out")) is not tied

    read = Model.from_pretrained(tmp_path / "out")
    assert read.config.tie_word_embeddings is tied
    for name, tensor in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], tensor), name


def test_parameters_go_out_in_the_dtype_of_computation_and_buffers_as_they_are(
    save_model: SaveModel, tmp_path: Path
) -> None:
    model = Model.from_pretrained(save_model(tmp_path / "model"))
    model.model.register_buffer("bias_of_experts", torch.randn(4))
    write_weights(model, tmp_path, dtype=torch.bfloat16, write=True)
    tensors = written(tmp_path)
    assert torch.equal(tensors.pop("model.bias_of_experts"), model.model.bias_of_experts)
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors.pop(name), parameter.bfloat16())
    assert not tensors


@pytest.mark.parametrize("kind", ["mixtral", "hrm_text", "gpt_neox"])
def test_what_is_apart_together_or_otherwise_called_in_files_is_written_so(
    kind: str, tmp_path: Path
) -> None:
    """Experts; attention's four weights, which files hold as one; a head of another name."""
    save_family(tmp_path / "model", kind)
    model = Model.from_pretrained(tmp_path / "model")
    (tmp_path / "out").mkdir()
    write_weights(model, tmp_path / "out", dtype=torch.float32, write=True)
    tensors, expected = written(tmp_path / "out"), written(tmp_path / "model")
    assert tensors.keys() == expected.keys()
    assert tensors.keys() - model.state_dict().keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name]), name
    whole = {name: tensor.shape for name, tensor in whole_tensors(model, torch.bfloat16)}
    assert whole == {name: shape for name, _, shape in layout(model, torch.bfloat16)}
    assert {dtype for _, dtype, _ in layout(model, torch.bfloat16)} == {torch.bfloat16}


def test_a_rank_that_does_not_write_leaves_no_file(save_model: SaveModel, tmp_path: Path) -> None:
    model = Model.from_pretrained(save_model(tmp_path / "model"))
    (tmp_path / "out").mkdir()
    write_weights(model, tmp_path / "out", dtype=torch.float32, write=False)
    assert not list((tmp_path / "out").iterdir())
