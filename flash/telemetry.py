"""A run's folder: what it was told, what it measured, what became of every episode.

runs/<name>/
├── config.yaml       the resolved configuration
├── metrics.jsonl     a line a step; names and units in METRICS
├── episodes.jsonl    a line an ended episode: EpisodeRecord
├── events.out.…      the same metrics for TensorBoard
├── checkpoints/      step_<version>/
├── logs/             of the processes
├── report.png        pictures of the run
└── summary.json      how it ended
"""

import contextlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import yaml

from flash.config import Config
from flash.rollout import EpisodeRecord

METRICS = {
    "step": "batches trained, including this one",
    "policy_version": "of the published weights",
    "time_s": "seconds since the run began, warm start excluded",
    "reward/mean": "of the trained episodes",
    "success_rate": "of the trained episodes, 0 to 1",
    "loss": "mean over trained tokens",
    "grad_norm": "before clipping, mean over mini-batches",
    "kl_behaviour": "KL(behaviour ‖ policy) in nats a token, k3 estimate",
    "ratio/clip_fraction": "share of tokens whose gradient PPO's clip stopped",
    "logprob_gap/max": "largest |worker - trainer| logprob: of the probe and of tokens of age 0",
    "staleness/mean": "age of trained tokens, in versions",
    "staleness/max": "never above alpha",
    "staleness/histogram": "trained tokens of age 0, 1, 2, …",
    "episodes/admitted": "since the start; = running + ready + the four outcomes",
    "episodes/running": "now",
    "episodes/ready": "ended and waiting for a batch, now",
    "episodes/trained": "since the start",
    "episodes/dropped": "since the start",
    "episodes/failed": "since the start",
    "episodes/cancelled": "since the start",
    "waste/tokens": "sampled by episodes that were not trained, since the start",
    "waste/env_s": "seconds of environments of such episodes, since the start",
    "tokens/prompt": "sent to workers, since the start",
    "tokens/generated": "sampled by workers, since the start",
    "tokens/trained": "sampled tokens in this batch",
    "tokens_per_s": "sampled by workers, over this step",
    "idle/trainer": "share of this step in which the trainer waited for a batch",
    "idle/workers": "share of this step in which a worker had no request, mean over workers",
    "idle/env_hosts": "share of this step in which a host had no call, mean; null without hosts",
    "time/generate_s": "of a trained episode, mean",
    "time/env_s": "of a trained episode, mean",
    "time/reward_s": "of a trained episode, mean",
    "time/wait_batch_s": "the trainer waited for this batch",
    "time/train_s": "the trainer trained",
    "time/publish_s": "export, publish and probe",
    "publish/count": "since the start",
    "publish/paused_s": "seconds that workers were paused, summed over workers, since the start",
}


class RunFolder:
    """Writes a run's files; each line is flushed, so that a crash loses none.

    A run never writes into another's folder: if there is a run of that name, this one is
    `<name>-2` and so on. With `checkpoint.resume` it goes on in its own; ValueError if there is
    nothing to resume.
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
        self.config = config
        self._files = contextlib.ExitStack()

    def __enter__(self) -> "RunFolder":
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(
            yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False)
        )
        self._metrics = self._open("metrics.jsonl")
        self._episodes = self._open("episodes.jsonl")
        self._board = _Board(self.path)
        self._files.callback(self._board.close)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._files.close()

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    def checkpoint(self, version: int) -> Path:
        """Where the checkpoint of that policy version belongs."""
        return self.path / "checkpoints" / f"step_{version:06d}"

    def forget_after(self, step: int) -> None:
        """On a resume: drop the lines of steps after the checkpoint; they are done again."""
        lines = [line for line in self.metrics() if line["step"] <= step]
        self._metrics.truncate(0)
        for line in lines:
            _write(self._metrics, line)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines so far."""
        return read_lines(self.path / "metrics.jsonl")

    def step(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl."""
        _write(self._metrics, metrics)
        self._board.add(metrics)

    def episode(self, record: EpisodeRecord) -> None:
        """One line of episodes.jsonl."""
        _write(self._episodes, asdict(record))

    def summary(self, summary: Mapping[str, Any]) -> None:
        (self.path / "summary.json").write_text(json.dumps(_plain(summary), indent=2) + "\n")

    def _open(self, name: str) -> IO[str]:
        return self._files.enter_context((self.path / name).open("a"))


class _Board:
    """Scalars for TensorBoard, written without torch."""

    def __init__(self, path: Path) -> None:
        # Slow to import, and only a run needs it.
        from tensorboard.compat.proto.event_pb2 import Event  # noqa: PLC0415
        from tensorboard.compat.proto.summary_pb2 import Summary  # noqa: PLC0415
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: PLC0415

        self._event, self._summary = Event, Summary
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
                wall_time=float(metrics["time_s"]),
                summary=self._summary(value=values),
            )
        )

    def close(self) -> None:
        self._writer.close()


def newest_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder, if there is one."""
    found = sorted((run / "checkpoints").glob("step_*"))
    whole = [folder for folder in found if re.fullmatch(r"step_\d+", folder.name)]
    return whole[-1] if whole else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a last line that a crash cut off is left out."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(line))
    return lines


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
