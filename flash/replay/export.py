"""A run's episodes as a dataset, a page of them at a time, so that any run goes through.

A row is an episode that the log has the tokens of still:

episode, group, attempt
task_set, seed, options                   the task's set, empty if there are none; options as JSON
outcome, reason, reward, success, turn_rewards
version_min, version_max                  of its sampled tokens
trained_at_version                        null if it was not trained
turns      [{read, said, reward}]: what the policy read and said, as its tokenizer writes it,
           special tokens too; `read` is null of an episode that came to no end
messages   [{role, content}]: the same for a chat template of your own: by `user` observations,
           or what was read where the log has none; by `assistant` what was said; no special
           tokens
sequences  [{token_ids, logprobs, versions, loss_mask}]: what is trained on, token by token;
           empty of an episode that came to no end
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from flash.plain import plain
from flash.replay.episodes import LoggedEpisode, Which
from flash.replay.logged_run import LoggedRun
from flash.replay.text import Decoder
from flash.system import machine

_PAGE = 100
_ROW_GROUP_TOKENS = 1 << 20  # of a row group at least, but for the last: some 20 MB in memory
_OWN_NAMES = "dataset_"


class _Writer(Protocol):
    def add(self, rows: list[dict[str, Any]], tokens: int) -> None: ...

    def close(self) -> None: ...


def export(
    run: LoggedRun, decode: Decoder, *, format: str, episodes: str, out: Path | None
) -> tuple[Path, int, int]:
    """Writes episodes to a file; returns it, how many they are, and how many more have gone from
    the log (`log.keep`).

    Args:
        format: jsonl or parquet.
        episodes: trained, or all: those that ended in any way.
        out: by default a file in the run's folder.

    The file is whole when it has its name. ValueError if nothing ended so, or all of it has gone,
    if `out` can't be written, or if what the format needs is not installed.
    """
    path = _checked(out or run.path / f"{_OWN_NAMES}{episodes}.{format}", run)
    make: Callable[[Path], _Writer] = _Jsonl if format == "jsonl" else _Parquet
    partial = path.with_name(f".{path.name}.partial")
    count = gone = 0
    try:
        writer = make(partial)
        try:
            for whole in _pages(run, episodes):
                page = [episode for episode in whole if not episode.is_gone]
                gone += len(whole) - len(page)
                tokens = sum(s.num_tokens for episode in page for s in episode.sequences)
                writer.add([_row(episode, decode) for episode in page], tokens)
                count += len(page)
        finally:
            writer.close()
        if gone and not count:
            raise ValueError(
                f"the tokens of all {gone} episodes of {run.path} are no longer in the log "
                f"(log.keep): nothing to export"
            )
        if not count:
            raise ValueError(
                f"{run.path} has no episode that {'ended' if episodes == 'all' else 'was trained'} "
                f"yet: nothing to export"
            )
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path, count, gone


def _checked(path: Path, run: LoggedRun) -> Path:
    """ValueError for a path that can't be written, or that is one of the run's own files."""
    if path.is_dir() or not path.parent.is_dir():
        why = "is a folder" if path.is_dir() else "is in no folder that there is"
        raise ValueError(f"--out {path}: it {why}: name a file")
    own = path.resolve().is_relative_to(run.path.resolve())
    if own and path.exists() and not path.name.startswith(_OWN_NAMES):
        raise ValueError(
            f"--out {path}: that is a file of the run itself: name another, or leave it out"
        )
    return path


def _pages(run: LoggedRun, episodes: str) -> Iterator[list[LoggedEpisode]]:
    after = -1
    while True:
        with run.reading() as reader:
            which: Which = "trained" if episodes == "trained" else "ended"
            page = reader.page(which, after=after, most=_PAGE)
        if not page:
            return
        yield page
        after = page[-1].episode


def _row(episode: LoggedEpisode, decode: Decoder) -> dict[str, Any]:
    return {
        "episode": episode.episode,
        "group": episode.group,
        "attempt": episode.attempt,
        "task_set": episode.task.task_set,
        "seed": episode.task.seed,
        "options": json.dumps(plain(episode.task.options)),
        "outcome": episode.outcome,
        "reason": episode.reason,
        "reward": episode.reward,
        "success": episode.success,
        "turn_rewards": list(episode.turn_rewards),
        "role_rewards": json.dumps(episode.role_rewards),
        "version_min": episode.version_min,
        "version_max": episode.version_max,
        "trained_at_version": episode.trained_at_version,
        "turns": [
            {
                "role": turn.spoken.role,
                "read": decode(turn.spoken.read) if turn.spoken.read else None,
                "said": decode(turn.spoken.said),
                "reward": turn.reward,
            }
            for turn in episode.turns
        ],
        "messages": list(_messages(episode, decode)),
        "sequences": [
            {
                "token_ids": sequence.token_ids,
                "logprobs": sequence.logprobs,
                "versions": sequence.versions,
                "loss_mask": sequence.loss_mask,
                "role": sequence.role,
            }
            for sequence in episode.sequences
        ],
    }


def _messages(episode: LoggedEpisode, decode: Decoder) -> Iterator[dict[str, str]]:
    for turn in episode.turns:
        if turn.before is not None:
            yield {"role": "user", "content": episode.seen[turn.before].observation.text}
        elif turn.spoken.read:
            yield {"role": "user", "content": decode.words(turn.spoken.read).strip()}
        yield {"role": "assistant", "content": decode.words(turn.spoken.said).strip()}


class _Jsonl:
    """A line a row."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def add(self, rows: list[dict[str, Any]], tokens: int) -> None:
        self._file.writelines(json.dumps(plain(row)) + "\n" for row in rows)

    def close(self) -> None:
        self._file.close()


class _Parquet:
    """Row groups of a million tokens or so."""

    def __init__(self, path: Path) -> None:
        try:
            import pyarrow  # noqa: PLC0415  (an extra)
            from pyarrow import parquet  # noqa: PLC0415
        except ImportError as error:
            raise ValueError(
                f"--format parquet needs pyarrow, which is not installed ({error}): run "
                f"{machine.how_to_install('parquet')}, or use --format jsonl"
            ) from error
        self._arrow = pyarrow
        self._schema = _schema(pyarrow)
        self._file = parquet.ParquetWriter(path, self._schema, compression="zstd")
        self._pending: list[Any] = []
        self._tokens = 0

    def add(self, rows: list[dict[str, Any]], tokens: int) -> None:
        self._pending.append(self._arrow.Table.from_pylist(rows, self._schema))
        self._tokens += tokens
        if self._tokens >= _ROW_GROUP_TOKENS:
            self._write()

    def _write(self) -> None:
        if self._pending:
            self._file.write_table(self._arrow.concat_tables(self._pending).combine_chunks())
        self._pending, self._tokens = [], 0

    def close(self) -> None:
        self._write()
        self._file.close()


def _schema(arrow: Any) -> Any:
    integer, real, text = arrow.int64(), arrow.float64(), arrow.string()
    turn = {"role": text, "read": text, "said": text, "reward": real}
    message = {"role": text, "content": text}
    sequence = {
        "token_ids": arrow.list_(arrow.int32()),
        "logprobs": arrow.list_(arrow.float32()),
        "versions": arrow.list_(arrow.int32()),
        "loss_mask": arrow.list_(arrow.float32()),
        "role": text,
    }

    def rows_of(fields: dict[str, Any]) -> Any:
        return arrow.list_(arrow.struct(fields))

    return arrow.schema(
        {
            "episode": integer,
            "group": integer,
            "attempt": arrow.int32(),
            "task_set": text,
            "seed": integer,
            "options": text,
            "outcome": text,
            "reason": text,
            "reward": real,
            "success": arrow.bool_(),
            "turn_rewards": arrow.list_(real),
            "role_rewards": text,
            "version_min": integer,
            "version_max": integer,
            "trained_at_version": integer,
            "turns": rows_of(turn),
            "messages": rows_of(message),
            "sequences": rows_of(sequence),
        }
    )
