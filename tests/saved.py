"""Checkpoints as files, without a trainer, and of a rank in the test's own process."""

from pathlib import Path
from typing import TYPE_CHECKING

from flash.trainer.checkpoint import write_state

if TYPE_CHECKING:
    from flash.trainer.rank import Rank


def fill(directory: Path, version: int) -> None:
    """As a trainer writes it, with nothing in its files that loads."""
    for folder in ("model", "policy"):
        (directory / folder).mkdir(parents=True, exist_ok=True)
    (directory / "model" / "config.json").write_bytes(b"w" * 100)
    (directory / "policy" / ".metadata").write_bytes(b"o" * 100)
    write_state(directory, version)


def fake_checkpoint(run: Path, version: int) -> Path:
    """A whole one of a run's folder."""
    path = run / "checkpoints" / f"step_{version:06d}"
    fill(path, version)
    return path


def save(rank: "Rank", directory: Path, version: int) -> None:
    """A whole one of the only rank."""
    rank.begin_checkpoint(str(directory), version)
    rank.written().result()
