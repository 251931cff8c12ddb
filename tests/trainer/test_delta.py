"""What changed between two exports, found and written; without vLLM, which takes it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flash.trainer import delta as module
from flash.trainer.delta import write_delta
from flash.worker.delta import TensorInfo, delta_of, file_in


def export(folder: Path, **tensors: torch.Tensor) -> Path:
    """As ranks write it: in several files."""
    folder.mkdir()
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, folder / f"model-{number}.safetensors")
    return folder


def test_a_delta_makes_the_next_export_of_the_one_before(tmp_path):
    old = {
        "half": torch.randn(30, 40, dtype=torch.bfloat16),
        "whole": torch.randn(50, 6),
        "same": torch.ones(7, dtype=torch.bfloat16),
    }
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["half"][3, 5], new["half"][29, 39] = 7.0, -0.0
    new["whole"][49, 5] = float("nan")
    before, after = export(tmp_path / "before", **old), export(tmp_path / "after", **new)
    assert write_delta(before, after) == 3 / 1507
    told = delta_of(after)
    assert told.before == str(before)
    assert {tensor.name: tensor.changed for tensor in told.tensors} == {
        "half": 2, "whole": 1, "same": 0
    }  # fmt: skip
    changes = load_file(file_in(after))
    assert changes.keys() == {"half", "whole"}
    for info in told.tensors:
        if info.changed:
            data = changes[info.name]
            assert len(data) % 16 == 0
            end = 4 * info.changed
            values = data[end : end + info.changed * new[info.name].itemsize]
            places = data[:end].view(torch.int32)
            old[info.name].view(-1)[places] = values.view(new[info.name].dtype)
    read = {name: t for file in after.glob("*.safetensors") for name, t in load_file(file).items()}
    for name, tensor in read.items():
        assert torch.equal(tensor.view(torch.uint8), old[name].view(torch.uint8)), name

    ones = int(torch.ones((), dtype=torch.bfloat16).view(torch.int16))
    assert TensorInfo("same", "bfloat16", [7], 0, 7 * ones) in told.tensors


def test_minus_zero_is_a_change(tmp_path):
    zeros = torch.zeros(100, dtype=torch.bfloat16)
    before = export(tmp_path / "before", a=zeros)
    after = export(tmp_path / "after", a=torch.where(torch.arange(100) == 9, -zeros, zeros))
    assert write_delta(before, after) == 0.01
    assert load_file(file_in(after))["a"][:4].view(torch.int32).tolist() == [9]


@pytest.mark.parametrize(("changed", "there"), [(16, True), (17, False)])
def test_there_is_a_delta_as_long_as_it_has_half_of_the_bytes_at_most(tmp_path, changed, there):
    old = torch.zeros(96, dtype=torch.bfloat16)
    new = old.clone()
    new[:changed] = 1.0
    before, after = export(tmp_path / "before", a=old), export(tmp_path / "after", a=new)
    assert write_delta(before, after) == changed / 96
    assert (delta_of(after) is not None) is there


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.zeros(4, 25)},
        {"a": torch.zeros(100, dtype=torch.bfloat16)},
        {"b": torch.zeros(100)},
        {"a": torch.zeros(100), "b": torch.zeros(1)},
    ],
)
def test_other_tensors_have_no_delta(tmp_path, other):
    before, after = export(tmp_path / "before", a=torch.zeros(100)), tmp_path / "after"
    changed = write_delta(before, export(after, **other))
    assert changed == (1 / 101 if len(other) == 2 else 1)
    assert delta_of(after) is None


def test_places_that_no_number_can_tell_have_no_delta(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_VALUES", 127)
    for number, size in enumerate((127, 128)):
        before = export(tmp_path / f"before {number}", a=torch.zeros(size))
        after = export(tmp_path / f"after {number}", a=torch.eye(size)[3])
        assert write_delta(before, after) == 1 / size
        assert (delta_of(after) is not None) is (size == 127)
