"""What is written of a model's weights, by one rank and by several."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flash.trainer import export
from flash.trainer.config import TrainerConfig
from flash.trainer.export import layout, whole_tensors, write_weights
from flash.trainer.trainer import Trainer
from tests.families import save_family

SaveModel = Callable[..., Path]
Model: Any = AutoModelForCausalLM


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """The only rank."""
    store: Any = dist
    dist.init_process_group("gloo", store=store.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


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


def test_what_is_kept_until_a_file_is_full_keeps_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An expert that another rank writes is not kept with the whole that both are parts of."""
    kept: list[torch.Tensor] = []

    def save(tensors: dict[str, torch.Tensor], *args: Any, **options: Any) -> None:
        kept.extend(tensors.values())

    save_family(tmp_path / "model", "mixtral")
    model = Model.from_pretrained(tmp_path / "model")
    monkeypatch.setattr(export, "save_file", save)
    write_weights(model, tmp_path, dtype=torch.bfloat16, write=True)
    assert sum(t.nbytes for t in kept) == sum(t.untyped_storage().nbytes() for t in kept)


@pytest.mark.slow
async def test_each_rank_writes_a_share_of_whole_tensors(
    save_model: SaveModel, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "model", tied=False)
    config = TrainerConfig(ranks=3)
    async with Trainer(model=source, config=config, run_dir=tmp_path / "run") as trainer:
        first = (await trainer.export_weights()).path
        sizes = [file.stat().st_size for file in sorted(first.glob("*.safetensors"))]
        assert len(sizes) == 3
        assert max(sizes) < 2 * min(sizes)
        places = json.loads((first / "model.safetensors.index.json").read_text())["weight_map"]
        of_files = {
            name: file.name for file in first.glob("*.safetensors") for name in load_file(file)
        }
        assert places == of_files
        exported, expected = written(first), load_file(source / "model.safetensors")
        assert exported.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(exported[name], tensor), name

        second = (await trainer.export_weights()).path
        for file in first.glob("*.safetensors"):
            assert load_file(file).keys() == load_file(second / file.name).keys()


EXPORT_WITHOUT_RANK_1 = """
import sys, torch, torch.distributed as dist
from pathlib import Path
from transformers import AutoModelForCausalLM
from flash.trainer.export import write_weights
source, out, store, rank = sys.argv[1:]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=int(rank), world_size=2)
model = AutoModelForCausalLM.from_pretrained(source)
write_weights(model, Path(out), dtype=torch.float32, write=rank == "0")
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_rank_that_does_not_see_the_folder_leaves_the_work_to_others(
    save_model: SaveModel, tmp_path: Path
) -> None:
    source = save_model(tmp_path / "model")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", EXPORT_WITHOUT_RANK_1]
    command += map(str, (source, tmp_path / "out", tmp_path / "store"))
    ranks = [subprocess.Popen([*command, rank]) for rank in "01"]
    assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    (file,) = (tmp_path / "out").glob("*.safetensors")
    assert load_file(file).keys() == load_file(source / "model.safetensors").keys()
