"""Models of which the next is the one before, with a little changed."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from flash.trainer.delta import write_delta


def stepped(before: Path, after: Path, seed: int) -> Path:
    """With a few values of every tensor changed, as a step does, by more than it does."""
    shutil.copytree(before, after, ignore=shutil.ignore_patterns("delta"))
    torch.manual_seed(seed)
    tensors = load_file(before / "model.safetensors")
    for tensor in tensors.values():
        flat = tensor.view(-1)
        flat[torch.randperm(len(flat))[: len(flat) // 40 + 1]] += 0.5
    save_file(tensors, after / "model.safetensors", metadata={"format": "pt"})
    assert 0.02 < write_delta(before, after) < 0.06
    return after
