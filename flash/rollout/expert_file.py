"""An expert's trajectories, read from a file: rows of `flash export`, or conversations.

a row with   `sequences`  token ids and masks, as they are: of this tokenizer, which is checked
             `messages`   by the model's chat template; the assistant's words are trained
"""

import contextlib
import logging
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from flash.conversation import ChatTemplate
from flash.system import machine
from flash.types import ExpertSequence
from flash.warm_start.demonstrations import messages_to_sample

logger = logging.getLogger(__name__)

_FIELD = "rollout.expert.file"
_COLUMNS = ("sequences", "messages", "turns")
_PAGE = 100
_ANOTHER = (
    "another tokenizer wrote it: without `sequences` in the rows their messages are tokenised"
)


class _Sequence(msgspec.Struct):
    token_ids: list[int]
    loss_mask: list[float]


class _Row(msgspec.Struct):
    sequences: list[_Sequence] | None = None
    messages: list[dict[str, Any]] | None = None
    turns: Any = None


def check_file(path: Path) -> None:
    """ValueError unless there is a file whose first row could be a trajectory."""
    with contextlib.closing(_rows(path)) as rows:
        for _ in rows:
            return
    raise ValueError(f"{_FIELD}={str(path)!r} holds no row: give one with trajectories")


def read_file(
    path: Path, tokenizer: Any, *, vocabulary: int, max_tokens: int
) -> list[list[ExpertSequence]]:
    """The sequences of each trajectory; of those that can't be imitated the log tells.

    Args:
        vocabulary: so many tokens the model knows.
        max_tokens: what is longer is left out (agent.max_sequence_tokens).

    Raises ValueError for rows that are wrong, and if nothing is left.
    """
    reader = _Reader(tokenizer, vocabulary)
    found: list[list[ExpertSequence]] = []
    left_out: Counter[str] = Counter()
    first: dict[str, str] = {}
    for source, row in _rows(path):
        sequences = reader.sequences(row, source)
        why = _useless(sequences, max_tokens)
        if why:
            left_out[why] += 1
            first.setdefault(why, source)
        else:
            found.append(sequences)
    told = ", ".join(f"{n} {why} (the first: {first[why]})" for why, n in left_out.items())
    if not found:
        raise ValueError(f"{_FIELD}={str(path)!r} has nothing to imitate: {told or 'no row'}")
    if told:
        total = len(found) + left_out.total()
        logger.warning("%s: of %d trajectories are left out %s", _FIELD, total, told)
    return found


def _useless(sequences: Sequence[ExpertSequence], max_tokens: int) -> str:
    """Why a trajectory is left out; empty if it is not."""
    if not any((sequence.loss_mask[1:] > 0).any() for sequence in sequences):
        return "without a word to imitate"
    if max(len(sequence.token_ids) for sequence in sequences) > max_tokens:
        return f"longer than agent.max_sequence_tokens={max_tokens}"
    return ""


class _Reader:
    """Makes sequences of rows, for one tokenizer."""

    def __init__(self, tokenizer: Any, vocabulary: int) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._template: ChatTemplate | None = None  # only of conversations

    def sequences(self, row: _Row, source: str) -> list[ExpertSequence]:
        """ValueError if they can't be the model's."""
        try:
            if row.sequences is None:
                return [self._of_messages(row.messages or [], source)]
            made = [_sequence(sequence, source) for sequence in row.sequences]
            for sequence in made:
                self._check_vocabulary(sequence)
            self._check_tokenizer(made, row.turns)
        except ValueError as error:
            raise ValueError(f"{_FIELD}: {source}: {error}") from error
        return made

    def _of_messages(self, messages: Sequence[dict[str, Any]], source: str) -> ExpertSequence:
        if self._template is None:
            self._template = ChatTemplate(self._tokenizer)
        sample = messages_to_sample(messages, self._template)
        return ExpertSequence(token_ids=sample.token_ids, loss_mask=sample.loss_mask, source=source)

    def _check_vocabulary(self, sequence: ExpertSequence) -> None:
        ids = sequence.token_ids
        unknown = ids[(ids < 0) | (ids >= self._vocabulary)]
        if unknown.size:
            raise ValueError(
                f"token {unknown[0]} is none of the model's {self._vocabulary}: {_ANOTHER}"
            )

    def _check_tokenizer(self, sequences: Sequence[ExpertSequence], turns: Any) -> None:
        """By the words of the first answer, which an export has beside its tokens."""
        try:
            said = "".join(turns[0]["said"].split())
        except (TypeError, LookupError, AttributeError):
            return  # it is of another kind, and does not say
        trained = np.flatnonzero(sequences[0].loss_mask > 0) if sequences else np.zeros(0, int)
        if not trained.size:
            return
        gaps = np.flatnonzero(np.diff(trained) > 1)
        answer = trained[: gaps[0] + 1 if gaps.size else None]
        text = self._tokenizer.decode(
            sequences[0].token_ids[answer].tolist(),
            skip_special_tokens=False,
            clean_up_tokenization_spaces=False,
        )
        if "".join(text.split()) != said:
            raise ValueError(
                f"its tokens are {text!r} here, and were {turns[0]['said']!r}: {_ANOTHER}"
            )


def _sequence(given: _Sequence, source: str) -> ExpertSequence:
    try:
        token_ids = np.array(given.token_ids, dtype=np.int64)
    except OverflowError:
        raise ValueError("a token id is no id") from None
    mask = np.array(given.loss_mask, dtype=np.float32)
    if len(token_ids) != len(mask):
        raise ValueError(
            f"{len(token_ids)} token_ids with a loss_mask of {len(mask)}: they must be equally many"
        )
    if not np.isfinite(mask).all() or (mask < 0).any():
        raise ValueError("loss_mask must be finite and at least 0")
    return ExpertSequence(token_ids=token_ids, loss_mask=mask, source=source)


# ── files ────────────────────────────────────────────────────────────────────────────────────


def _rows(path: Path) -> Generator[tuple[str, _Row], None, None]:
    """Each row with its place. ValueError for a file that can't be read, or a row that is none."""
    if not path.is_file():
        why = "is no file" if path.exists() else "is not there"
        raise ValueError(
            f"{_FIELD}={str(path)!r} {why}: name a file of JSON lines or Parquet, or leave it out "
            f"({_FIELD}=null), and nothing is imitated"
        )
    try:
        for source, row in _of_parquet(path) if path.suffix == ".parquet" else _of_lines(path):
            if row.sequences is None and row.messages is None:
                raise ValueError(
                    f"{_FIELD}: {source} has neither `messages` nor `sequences`: give rows of "
                    f"flash export, or of {{'messages': [{{'role': …, 'content': …}}]}}"
                )
            yield source, row
    except OSError as error:
        raise ValueError(f"{_FIELD}={str(path)!r} can't be read: {error}") from error


def _of_lines(path: Path) -> Iterator[tuple[str, _Row]]:
    decoder = msgspec.json.Decoder(_Row)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeError) as error:
                raise ValueError(f"{_FIELD}: {path}:{number} is no row: {error}") from error


def _of_parquet(path: Path) -> Iterator[tuple[str, _Row]]:
    try:
        import pyarrow  # noqa: PLC0415  (an extra)
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"{_FIELD}={str(path)!r} needs pyarrow, which is not installed ({error}): run "
            f"{machine.how_to_install('parquet')}, or give JSON lines"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
            for page in file.iter_batches(_PAGE, columns=columns):
                for row in page.to_pylist():
                    number += 1
                    yield f"{path}:{number}", msgspec.convert(row, _Row)
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{_FIELD}={str(path)!r} is no Parquet that can be read: {error}"
        ) from error
    except msgspec.MsgspecError as error:
        raise ValueError(f"{_FIELD}: {path}:{number} is no row: {error}") from error
