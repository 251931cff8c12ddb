"""Checkpoints as files, without a trainer."""

from pathlib import Path

from flash.trainer.checkpoint import write_state


def fill(directory: Path, version: int) -> None:
    """As a trainer writes it, with nothing in its files that loads."""
    for folder in ("model", "optimizer"):
        (directory / folder).mkdir(parents=True)
    (directory / "model" / "model.safetensors").write_bytes(b"w" * 100)
    (directory / "optimizer" / ".metadata").write_bytes(b"o" * 100)
    write_state(directory, version)


def fake_checkpoint(run: Path, version: int) -> Path:
    """A whole one of a run's folder."""
    path = run / "checkpoints" / f"step_{version:06d}"
    fill(path, version)
    return path
