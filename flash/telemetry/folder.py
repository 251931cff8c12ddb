"""A run's folder: what it was told, what it measured, what became of every episode.

runs/<name>/
├── config.yaml       the resolved configuration
├── metrics.jsonl     a line a step; names and units in metrics.py
├── episodes.jsonl    a line an ended episode: EpisodeRecord
├── events.out.…      the same metrics for TensorBoard
├── checkpoints/      step_<version>/; whole once tasks.json is in it
├── logs/             of the processes; controller.log holds what ended the run, if anything did,
│                     stalls.log what blocked it
├── report.png        pictures of the run
└── summary.json      how it ended
"""

import asyncio
import contextlib
import json
import logging
import math
import os
import re
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import yaml

from flash.config import Config
from flash.rollout.episode import Episode
from flash.rollout.observer import Observer
from flash.rollout.record import EpisodeRecord
from flash.rollout.tasks import TASKS_FILE
from flash.trainer.checkpoint import STATE_FILE

logger = logging.getLogger(__name__)


class RunFolder(Observer):
    """Writes a run's files; each line is flushed, so that a crash loses none.

    A run never writes into another's folder: if there is a run of that name, this one is
    `<name>-2` and so on. With `checkpoint.resume` it goes on in its own; ValueError if there is
    nothing to resume. A run that ends before its first line gives its name back.
    """

    def __init__(self, config: Config) -> None:
        self.path = config.runs_dir / config.name
        self.resume_from: Path | None = None
        if config.checkpoint.resume:
            self.resume_from = newest_checkpoint(self.path)
            if self.resume_from is None:
                raise ValueError(
                    f"checkpoint.resume is on, but {self.path}/checkpoints holds no checkpoint: "
                    f"leave it out to start anew"
                )
        number = 2
        while self.resume_from is None and (self.path / "metrics.jsonl").exists():
            self.path = config.runs_dir / f"{config.name}-{number}"
            number += 1
        if self.path.name != config.name:
            logger.warning(
                "there is a run %s already: this one goes to %s (--resume goes on with a run)",
                config.runs_dir / config.name,
                self.path,
            )
        # As the file keeps it, it is enough to go on (`flash train runs/x-2/config.yaml --resume`)
        # and to start anew; that this start is a resume is no property of the run.
        anew = config.checkpoint.model_copy(update={"resume": False})
        self.config = config.model_copy(update={"name": self.path.name, "checkpoint": anew})
        self._files = contextlib.ExitStack()

    def __enter__(self) -> "RunFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.yaml").write_text(
                yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
            )
            self._metrics = self._open("metrics.jsonl")
            self._episodes = self._open("episodes.jsonl")
        except OSError as error:
            raise ValueError(
                f"runs_dir={str(self.config.runs_dir)!r}: {error}: give a folder to write to"
            ) from error
        self._board = _Board(self.path)
        self._files.callback(self._board.close)
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Where the disk is full, or the folder gone, that is what ended the run.
        with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
            self._close(error)

    def _close(self, error: BaseException | None) -> None:
        self._files.close()
        if error is not None and not isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
            self.logs.mkdir(exist_ok=True)
            path = self.logs / "controller.log"
            with path.open("a") as log:
                log.writelines(traceback.format_exception(error))
            error.add_note(f"more in {path}")
        files = [self.path / name for name in ("metrics.jsonl", "episodes.jsonl")]
        if not any(path.stat().st_size for path in files):
            for path in files:
                path.unlink()

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def checkpoint(self, version: int) -> Path:
        """Where the checkpoint of that policy version belongs."""
        return self.path / "checkpoints" / f"step_{version:06d}"

    def forget_after(self, step: int) -> None:
        """On a resume: drop what came after the checkpoint of that step; it is done again.

        Of the episodes, that is all from the first one that a later step trained.
        """
        _cut(self.path / "metrics.jsonl", lambda line: line["step"] > step)
        _cut(
            self.path / "episodes.jsonl",
            lambda line: line["outcome"] == "trained" and line["trained_at_version"] >= step,
        )
        self._board.forget_after(step)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines so far."""
        return read_lines(self.path / "metrics.jsonl")

    def step(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        _write(self._metrics, metrics)
        self._board.add(metrics)

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        """One line of episodes.jsonl."""
        _write(self._episodes, asdict(record))

    def stalled(self, report: str) -> None:
        """What the watchdog said, in logs/stalls.log."""
        self.logs.mkdir(exist_ok=True)
        with (self.logs / "stalls.log").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {report}\n\n")

    def summary(self, summary: Mapping[str, Any]) -> None:
        (self.path / "summary.json").write_text(json.dumps(_plain(summary), indent=2) + "\n")

    def _open(self, name: str) -> IO[str]:
        path = self.path / name
        if path.exists():
            _cut(path, lambda _: False)
        return self._files.enter_context(path.open("a"))


class _Board:
    """Scalars for TensorBoard, written without torch."""

    def __init__(self, path: Path) -> None:
        # Slow to import, and only a run needs it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # noqa: PLC0415
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: PLC0415

        self._event, self._summary, self._session = Event, Summary, SessionLog
        self._writer = EventFileWriter(str(path))

    def add(self, metrics: Mapping[str, Any]) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in metrics.items()
            if isinstance(value, int | float)
        ]
        self._writer.add_event(
            self._event(
                step=int(metrics["step"]),
                wall_time=time.time(),  # a date, for TensorBoard's own axes
                summary=self._summary(value=values),
            )
        )

    def forget_after(self, step: int) -> None:
        """TensorBoard drops the events of later steps in earlier files."""
        start = self._session(status=self._session.START)
        self._writer.add_event(self._event(step=step + 1, wall_time=time.time(), session_log=start))

    def close(self) -> None:
        self._writer.close()


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, if there is one."""
    whole = [
        folder
        for folder in (run / "checkpoints").glob("step_*")
        if re.fullmatch(r"step_\d+", folder.name)
        and all((folder / name).exists() for name in (STATE_FILE, TASKS_FILE))
    ]
    return max(whole, key=lambda folder: int(folder.name.removeprefix("step_")), default=None)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line that a crash cut off is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if isinstance(line := json.loads(text), dict):
                    lines.append(line)
    return lines


def _cut(path: Path, is_over: Callable[[dict[str, Any]], bool]) -> None:
    """Shortens the file to the lines before the first that is over, or that a crash cut off.

    One system call shortens it, so that no other crash can lose the lines before.
    """
    kept = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or is_over(json.loads(line)):
                break
            kept += len(line)
    os.truncate(path, kept)


def _write(file: IO[str], line: Mapping[str, Any]) -> None:
    file.write(json.dumps(_plain(line)) + "\n")
    file.flush()


def _plain(value: Any) -> Any:
    """JSON has no nan and no infinity; both become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
