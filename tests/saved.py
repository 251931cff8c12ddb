"""Checkpoints as files, without a trainer."""

from collections.abc import Sequence
from pathlib import Path

import msgspec

from flash.checkpoints import CUT_FILE, Cut
from flash.rollout.adaptive import AlphaState
from flash.trainer.checkpoint import write_state


def cut_at(version: int, *, given: int = 0, unfinished: Sequence[int] = ()) -> Cut:
    alpha = AlphaState(alpha=1.0, seen=[], unjudged=0)
    return Cut(version=version, given=given, unfinished=list(unfinished), alpha=alpha)


def fill(directory: Path, version: int) -> None:
    """As a trainer writes it, with nothing in its files that loads."""
    (directory / "model").mkdir(parents=True)
    (directory / "model" / "model.safetensors").write_bytes(b"w" * 100)
    (directory / "optimizer.pt").write_bytes(b"o" * 100)
    write_state(directory, version)


def fake_checkpoint(run: Path, version: int) -> Path:
    """A whole one of a run's folder."""
    path = run / "checkpoints" / f"step_{version:06d}"
    fill(path, version)
    (path / CUT_FILE).write_bytes(msgspec.json.encode(cut_at(version)))
    return path
