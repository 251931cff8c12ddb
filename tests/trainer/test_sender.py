"""What a sender tells of a directory of weights, and what it then broadcasts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from flash.trainer.sender import Sender


class Recorder:
    """A group that keeps what is broadcast."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def new_id(self) -> bytes:
        return b""

    def join(self, group_id: bytes, size: int) -> None:
        pass

    def broadcast(self, packed: Tensor) -> None:
        self.sent.append(packed)


def received(update: dict[str, list], flat: Tensor) -> dict[str, Tensor]:
    """As vLLM unpacks: the tensors in the order told, one behind the other."""
    dtypes = [getattr(torch, name) for name in update["dtype_names"]]
    sizes = [
        torch.Size(shape).numel() * dtype.itemsize
        for shape, dtype in zip(update["shapes"], dtypes, strict=True)
    ]
    return {
        name: piece.view(dtype).view(shape)
        for name, dtype, shape, piece in zip(
            update["names"], dtypes, update["shapes"], flat.split(sizes), strict=True
        )
    }


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Of several shapes, one of them odd and in bfloat16, another without dimensions."""
    return {
        "a.weight": torch.randn(4, 3),
        "b.bias": torch.randn(5).bfloat16(),
        "b.weight": torch.randn(7, 2),
        "c.scale": torch.tensor(3.5),
        "d.weight": torch.randn(8, 8),
    }


@pytest.fixture
def directory(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    names = list(tensors)
    save_file({n: tensors[n] for n in names[:2]}, tmp_path / "model-00001.safetensors")
    save_file({n: tensors[n] for n in names[2:]}, tmp_path / "model-00002.safetensors")
    return tmp_path


@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 20])
def test_every_tensor_arrives_whole_once_whatever_the_chunks(chunk_bytes, directory, tensors):
    group = Recorder()
    sender = Sender(group)
    updates = sender.open(str(directory), chunk_bytes)
    arrived: dict[str, Tensor] = {}
    for number, update in enumerate(updates):
        sender.send(number)
        new = received(update, group.sent[-1])
        assert not new.keys() & arrived.keys()
        arrived |= new
    assert arrived.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert arrived[name].dtype == tensor.dtype
        assert torch.equal(arrived[name], tensor)


def test_a_chunk_is_one_dtype_and_no_larger_than_asked_unless_it_is_one_tensor(directory):
    group = Recorder()
    sender = Sender(group)
    updates = sender.open(str(directory), 100)
    for number, update in enumerate(updates):
        sender.send(number)
        assert len(set(update["dtype_names"])) == 1
        assert group.sent[-1].nbytes <= 100 or update["names"] == ["d.weight"]
    # The two of float32 that fit into 100 bytes, 56 and 4 bytes long, go together.
    assert any(len(update["names"]) == 2 for update in updates)


def test_what_was_opened_can_be_sent_after_its_directory_is_gone(directory, tensors):
    group = Recorder()
    sender = Sender(group)
    updates = sender.open(str(directory), 1 << 20)
    for file in directory.iterdir():
        file.unlink()
    (number,) = [n for n, update in enumerate(updates) if "a.weight" in update["names"]]
    sender.send(number)
    assert torch.equal(received(updates[number], group.sent[-1])["a.weight"], tensors["a.weight"])
    with pytest.raises(ValueError, match="no safetensors in"):
        sender.open(str(directory), 1 << 20)
