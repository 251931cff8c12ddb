"""A run's folder: what it was told, what it measured, what became of every episode.

runs/<name>/
├── config.yaml       the resolved configuration
├── metrics.jsonl     a line a step; names and units in metrics.py
├── episodes.jsonl    a line an ended episode: EpisodeRecord
├── log.sqlite        all that happened, and what a resume goes on from (flash/log/); log.id is the
│                     run's name in it
├── transcripts.jsonl what was said in some of them; see transcripts.py, and flash show
├── events.out.…      the same metrics for TensorBoard
├── checkpoints/      step_<version>/ (flash/checkpoints.py)
├── logs/             of the processes; controller.log holds what ended the run, if anything did,
│                     stalls.log what blocked it
├── report.png        pictures of the run
└── summary.json      how it ended
"""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import yaml

from flash.checkpoints import Checkpoint, checkpoint_to_go_on_from
from flash.config import Config
from flash.config.resumed import Difference, check_resumed, differences, told
from flash.config.source import read_mapping
from flash.log.past import Past
from flash.log.run_log import ID_FILE
from flash.plain import plain
from flash.rollout.episode import Episode
from flash.rollout.observer import Observer
from flash.rollout.record import EpisodeRecord
from flash.system.durable import HeldError, locked, write_whole
from flash.telemetry.episode_lines import EpisodeLines

TRANSCRIPTS_FILE = "transcripts.jsonl"
_OF_OUTCOME = ("outcome", "reason", "trained_at_version")

logger = logging.getLogger(__name__)


class RunFolder(Observer):
    """Writes a run's files; each line is flushed, so that a crash loses none. Those of episodes are
    a moment late, and come from a thread; of what a crash loses of them the log has all.

    A run never writes into another's folder: if there is a run of that name, this one is
    `<name>-2` and so on. With `checkpoint.resume` it goes on in its own; entering raises ValueError
    if there is nothing to resume, if the run is still going, or if the configuration is not one
    that it can go on with. A run that ends before its first line gives its name back.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.path = config.runs_dir / config.name
        self.resumes = False
        self.checkpoint: Checkpoint | None = None  # that it goes on from
        self.changed: list[Difference] = []  # what is configured otherwise since

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opened:
            try:
                self._open(opened)
            except OSError as error:
                raise ValueError(
                    f"runs_dir={str(self.config.runs_dir)!r}: {error}: give a folder to write to"
                ) from error
            self._opened = opened.pop_all()
        return self

    def _open(self, opened: contextlib.ExitStack) -> None:
        if self.config.checkpoint.resume:
            self._go_on(opened)
        else:
            self._begin(opened)
        # As the file keeps it, it is enough to go on (`flash train runs/x-2/config.yaml --resume`)
        # and to start anew; that this start is a resume is no property of the run.
        anew = self.config.checkpoint.model_copy(update={"resume": False})
        self.config = self.config.model_copy(update={"name": self.path.name, "checkpoint": anew})
        text = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        write_whole(self.path / "config.yaml", text.encode())
        self._metrics = opened.enter_context(_lines(self.path / "metrics.jsonl"))
        self._episodes = opened.enter_context(EpisodeLines(_lines(self.path / "episodes.jsonl")))
        self._transcripts = opened.enter_context(_lines(self.path / TRANSCRIPTS_FILE))
        self._board = _Board(self.path)
        opened.callback(self._board.close)

    def _begin(self, opened: contextlib.ExitStack) -> None:
        """In the first folder of its name that no run has."""
        for number in itertools.count(2):
            self.path.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(HeldError):
                if not self._has_a_run():
                    with contextlib.ExitStack() as attempt:
                        self._held = attempt.enter_context(locked(self.path))
                        if not self._has_a_run():  # one may have begun and ended meanwhile
                            opened.push(attempt.pop_all())
                            break
            self.path = self.path.with_name(f"{self.config.name}-{number}")
        if self.path.name != self.config.name:
            logger.warning(
                "there is a run %s already: this one goes to %s (--resume goes on with a run)",
                self.path.with_name(self.config.name),
                self.path,
            )

    def _has_a_run(self) -> bool:
        """Whether a run began in the folder: it has a log then, or something to show."""
        metrics = self.path / "metrics.jsonl"
        return any((self.path / name).exists() for name in (ID_FILE, "checkpoints")) or (
            metrics.exists() and metrics.stat().st_size > 0
        )

    def _go_on(self, opened: contextlib.ExitStack) -> None:
        """In its own folder, from its newest whole checkpoint."""
        if not self.path.is_dir():
            raise ValueError(self._nothing_to_resume())
        try:
            self._held = opened.enter_context(locked(self.path))
        except HeldError as error:
            stop = f"stop that one first (kill -INT {error.pid})" if error.pid else "stop it first"
            raise ValueError(
                f"checkpoint.resume is on, but {self.path} still runs, in {error}: {stop}, or "
                f"start anew under another --name"
            ) from None
        if not (self.path / ID_FILE).exists():
            raise ValueError(self._nothing_to_resume())
        if (before := self.path / "config.yaml").exists():
            self.changed = differences(read_mapping(before, "env: NAME"), self.config)
            check_resumed(self.changed)
        self.resumes = True
        self.checkpoint = checkpoint_to_go_on_from(self.path)

    def _nothing_to_resume(self) -> str:
        return (
            f"checkpoint.resume is on, but {self.path} holds no run with a log ({ID_FILE}): leave "
            f"it out to start anew"
        )

    def __exit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Where the disk is full, or the folder gone, that is what ended the run.
        with contextlib.suppress(OSError) if error is not None else contextlib.nullcontext():
            self._close(error)

    def _close(self, error: BaseException | None) -> None:
        with self._opened:
            self._log(error)
            self.flush()
            names = ("metrics.jsonl", "episodes.jsonl", TRANSCRIPTS_FILE)
            files = [self.path / name for name in names]
            kept = self.resumes or (self.path / "checkpoints").exists()
            if not kept and not any(path.stat().st_size for path in files):
                for path in (*files, *self.path.glob("log.*")):
                    path.unlink()

    def _log(self, error: BaseException | None) -> None:
        """What ended the run, if it was a failure."""
        if error is not None and not isinstance(error, asyncio.CancelledError | KeyboardInterrupt):
            self.logs.mkdir(exist_ok=True)
            path = self.logs / "controller.log"
            with path.open("a") as log:
                log.writelines(traceback.format_exception(error))
            error.add_note(f"more in {path}")

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def version(self) -> int:
        """Of the checkpoint that it goes on from; 0 without one."""
        return self.checkpoint.version if self.checkpoint else 0

    def go_on(self, past: Past) -> None:
        """On a resume: makes its files what the log says."""
        path, done = self.path / "metrics.jsonl", past.steps_done
        _cut(path, lambda line: line["step"] > done)
        known = {line["step"] for line in read_lines(path)}
        for line in past.steps:
            if line["step"] not in known:
                _write(self._metrics, line)
        records = {record.episode: record for record in past.records}
        # One that a start left for the next ended then, and perhaps otherwise since.
        _keep(
            self.path / "episodes.jsonl",
            lambda line: (
                (record := records.get(line["episode"])) is not None
                and all(line[name] == getattr(record, name) for name in _OF_OUTCOME)
            ),
        )
        for line in read_lines(self.path / "episodes.jsonl"):
            records.pop(line["episode"], None)
        for record in records.values():
            self._episodes.add(record)
        _cut(self.path / TRANSCRIPTS_FILE, lambda line: line["step"] > past.logged_version)
        self._board.forget_after(done)
        if news := told(self.changed, first_step=past.version + 1):
            logger.warning("%s", news)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines so far."""
        return read_lines(self.path / "metrics.jsonl")

    def measured(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; FileNotFoundError if nobody would find it any more."""
        self._held.check_there()
        _write(self._metrics, metrics)
        self._board.add(metrics)

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        """One line of episodes.jsonl, soon; OSError if one before it could not be written."""
        self._episodes.add(record)

    def flush(self) -> None:
        """Waits until every line is in its file."""
        self._episodes.flush()

    def transcript(self, line: Mapping[str, Any]) -> None:
        """One line of transcripts.jsonl."""
        _write(self._transcripts, line)

    def stalled(self, report: str) -> None:
        """What the watchdog said, in logs/stalls.log."""
        self.logs.mkdir(exist_ok=True)
        with (self.logs / "stalls.log").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {report}\n\n")

    def summary(self, summary: Mapping[str, Any]) -> None:
        text = json.dumps(plain(summary), indent=2) + "\n"
        write_whole(self.path / "summary.json", text.encode())


class _Board:
    """Scalars for TensorBoard, written without torch, and without a thread: what can't be written
    is an error of whoever wrote it."""

    def __init__(self, path: Path) -> None:
        # Slow to import, and only a run needs it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # noqa: PLC0415
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415
        from tensorboard.summary.writer.record_writer import RecordWriter  # noqa: PLC0415

        self._event, self._summary, self._session = Event, Summary, SessionLog
        # Readers take files in the order of their names, also where a clock was set back.
        before = (file.name.split(".")[3] for file in path.glob("events.out.tfevents.*"))
        first = max([int(time.time()), *(int(made) + 1 for made in before if made.isdigit())])
        name = f"events.out.tfevents.{first}.{socket.gethostname()}.{os.getpid()}"
        self._records = RecordWriter((path / name).open("ab"))
        self._write(file_version="brain.Event:2")  # of the format

    def add(self, metrics: Mapping[str, Any]) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=float(value))
            for name, value in metrics.items()
            if isinstance(value, int | float)
        ]
        self._write(step=int(metrics["step"]), summary=self._summary(value=values))

    def forget_after(self, step: int) -> None:
        """TensorBoard drops the events of later steps in earlier files."""
        start = self._session(status=self._session.START)
        self._write(step=step + 1, session_log=start)

    def close(self) -> None:
        self._records.close()

    def _write(self, **event: Any) -> None:
        wall_time = time.time()  # a date, for TensorBoard's own axes
        self._records.write(self._event(wall_time=wall_time, **event).SerializeToString())
        self._records.flush()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line that a crash cut off is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                if isinstance(line := json.loads(text), dict):
                    lines.append(line)
    return lines


def steps_done(run: Path) -> int:
    """The last step whose line a run's folder has."""
    return max((line["step"] for line in read_lines(run / "metrics.jsonl")), default=0)


def _lines(path: Path) -> IO[str]:
    """The file, to add lines to."""
    if path.exists():
        _cut(path, lambda _: False)
    return path.open("a", encoding="utf-8")


def _cut(path: Path, is_over: Callable[[dict[str, Any]], bool]) -> None:
    """Shortens the file to the lines before the first that is over, or that a crash spoiled.

    One system call shortens it, so that no other crash can lose the lines before.
    """
    kept = 0
    with path.open("rb") as file:
        for line in file:
            try:
                over = not line.endswith(b"\n") or is_over(json.loads(line))
            except ValueError:  # no JSON, or no text
                over = True
            if over:
                break
            kept += len(line)
    os.truncate(path, kept)


def _keep(path: Path, stays: Callable[[dict[str, Any]], bool]) -> None:
    """Leaves out the other lines. What a crash meanwhile loses is in the log."""
    kept = [line for line in read_lines(path) if stays(line)]
    path.write_text("".join(json.dumps(line) + "\n" for line in kept))


def _write(file: IO[str], line: Mapping[str, Any]) -> None:
    file.write(json.dumps(plain(line)) + "\n")
    file.flush()
