"""A checkpoint as a Hugging Face folder: what `save_pretrained` would have written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader
from transformers import AutoModelForCausalLM

from flash.cli import main as cli
from flash.trainer.config import LoraConfig, TrainerConfig
from flash.trainer.hugging_face import export_model
from flash.trainer.model_files import check_files
from flash.types import Sample
from tests.families import save_family
from tests.saved import save
from tests.trainer.test_rank import started, step

SamplesOf = Callable[..., list[Sample]]
SaveModel = Callable[..., Path]
Model: Any = AutoModelForCausalLM
CONFIG = TrainerConfig(learning_rate=1e-2, warmup_steps=0)
LORA = CONFIG.model_copy(update={"lora": LoraConfig(rank=4, alpha=8)})


def trained(model: Path, run: Path, samples_of: SamplesOf, config: TrainerConfig) -> Path:
    """A checkpoint after a step, with what the trainer itself writes of the model beside it."""
    with started(model, run, config) as rank:
        step(rank, samples_of(4), config)
        rank.export(str(run / "exported"))
        save(rank, run / "saved", 1)
    return run / "saved"


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    files = folder.glob("*.safetensors")
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("config", [CONFIG, LORA], ids=["whole", "adapters"])
def test_files_and_tensors_are_those_that_save_pretrained_writes(
    config: TrainerConfig, tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf
) -> None:
    model = save_model(tmp_path / "model")
    (model / "tokenizer.json").write_text("{}")
    saved = trained(model, tmp_path, samples_of, config)
    export_model(saved, tmp_path / "one", dtype="float32")
    assert same(weights_in(tmp_path / "one"), weights_in(tmp_path / "exported"))
    assert not same(weights_in(tmp_path / "one"), weights_in(model))
    loaded = Model.from_pretrained(tmp_path / "one")
    for size, ours in ((5 * 10**9, "one"), (20_000, "parts")):
        if ours == "parts":
            export_model(saved, tmp_path / ours, dtype="float32", file_bytes=size)
        loaded.save_pretrained(tmp_path / f"theirs {ours}", max_shard_size=size)
        mine, theirs = tmp_path / ours, tmp_path / f"theirs {ours}"
        names = {path.name for path in theirs.iterdir()}
        assert {path.name for path in mine.iterdir()} == names | {"tokenizer.json"}
        assert same(weights_in(mine), weights_in(theirs))
        assert json.loads((mine / "config.json").read_text()) == json.loads(
            (theirs / "config.json").read_text()
        )
    files = [*(tmp_path / "parts").glob("*.safetensors")]
    assert len(files) > 2
    assert all(file.stat().st_size < 22_000 for file in files)
    assert same(Model.from_pretrained(tmp_path / "parts").state_dict(), loaded.state_dict())


@pytest.mark.parametrize("kind", ["mixtral", "gpt_neox"])
def test_what_is_apart_or_together_in_files_is_written_so(
    kind: str, tmp_path: Path, samples_of: SamplesOf
) -> None:
    save_family(tmp_path / "model", kind)
    saved = trained(tmp_path / "model", tmp_path, samples_of, CONFIG)
    export_model(saved, tmp_path / "out", dtype="float32")
    assert weights_in(tmp_path / "out").keys() == weights_in(tmp_path / "model").keys()
    assert same(weights_in(tmp_path / "out"), weights_in(tmp_path / "exported"))


def test_where_tensors_are_in_a_checkpoint_is_read_once(
    tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = trained(save_model(tmp_path / "model"), tmp_path, samples_of, CONFIG)
    times: list[dict[str, Any]] = []
    read = FileSystemReader.read_metadata

    def counted(reader: FileSystemReader, **settings: Any) -> Any:
        times.append(settings)
        return read(reader, **settings)

    monkeypatch.setattr(FileSystemReader, "read_metadata", counted)
    export_model(saved, tmp_path / "out", dtype="float32")
    assert len(weights_in(tmp_path / "out")) > 10
    assert len(times) == 1


def test_the_command_writes_a_folder_that_is_not_there_in_the_dtype_that_is_asked_for(
    tmp_path: Path,
    save_model: SaveModel,
    samples_of: SamplesOf,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved = trained(save_model(tmp_path / "model"), tmp_path, samples_of, CONFIG)
    words = ["export", str(saved), "--out", str(tmp_path / "out")]
    assert cli.run([*words, "--dtype", "bfloat16"]) == 0
    expected = {name: t.bfloat16() for name, t in weights_in(tmp_path / "exported").items()}
    assert same(weights_in(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert cli.run(words) == 2
    assert "is there already: give a folder to be made" in capsys.readouterr().err
    (saved / "policy" / "__0_0.distcp").unlink()
    assert cli.run([*words[:-1], str(tmp_path / "more")]) == 2
    assert "is damaged (policy/__0_0.distcp is missing)" in capsys.readouterr().err
    assert not [*tmp_path.glob("*more*")]


def test_what_a_checkpoint_has_beside_its_weights_is_no_model_and_the_remedy_is_told(
    tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf
) -> None:
    saved = trained(save_model(tmp_path / "model"), tmp_path, samples_of, CONFIG)
    remedy = r"beside its weights: make a model of that \(flash export CHECKPOINT --out DIR\)"
    with pytest.raises(ValueError, match=remedy):
        check_files(str(saved / "model"), field="model")
