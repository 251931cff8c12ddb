"""Weights in one process's memory that another on the same device reads; on a CPU, as files in
memory. What a GPU adds is its handle, which `pytest -m gpu` opens."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash.worker.shared import SharedWeights, shared_weights

TENSORS = {
    "embedding": torch.randn(7, 3).to(torch.bfloat16),
    "odd": torch.randn(5).to(torch.bfloat16),
    "float": torch.randn(3, 2, dtype=torch.float32),
    "number": torch.tensor(4),
    "across": torch.arange(6.0).view(2, 3).t(),
}
READ = """
import sys, torch
from pathlib import Path
from flash.worker.shared import shared_weights

with shared_weights(Path(sys.argv[1]), sys.argv[2]) as tensors:
    torch.save({name: tensor.cpu().clone() for name, tensor in tensors}, sys.argv[3])
    tensors.clear()
"""


def shared(directory: Path, device: str = "cpu") -> SharedWeights:
    layout = [(name, tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()]
    memory = SharedWeights(layout, directory, device)
    for name, tensor in TENSORS.items():
        memory.fill([(name, tensor.to(device))])
    memory.tell()
    return memory


def assert_same(found: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
            ],
        ),
    ],
)
def test_another_process_reads_what_was_put_there(device: str, tmp_path: Path) -> None:
    memory = shared(tmp_path, device)
    copy = tmp_path / "copy.pt"
    subprocess.run([sys.executable, "-c", READ, tmp_path, device, copy], check=True)
    assert_same(torch.load(copy))
    del memory


def test_memory_that_has_not_what_was_told_is_not_read(tmp_path: Path) -> None:
    shared(tmp_path)
    with shared_weights(tmp_path, "cpu") as tensors:
        assert_same(dict(tensors))
        tensors[0][1][0, 0] += 1
    with (
        pytest.raises(ValueError, match="tells of checksum"),
        shared_weights(tmp_path, "cpu"),
    ):
        pass


def test_where_nothing_was_told_of_there_is_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"), shared_weights(tmp_path, "cpu"):
        pass
