"""Questions with known answers, of any data set: RLVR on GSM8K and the like."""

import functools
import json
import re
import string
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces

from .rows import RowSource, State, are_lines, entries, open_rows, without_bars

_JOINS = r"[-+−–.,/:^×]"  # between digits they make a date, a range, a fraction …, and no number
_NUMBER = re.compile(
    rf"""(?<!\w)(?<!\d{_JOINS})             # not within a word, or within such
    (?P<sign>(?<![)\]])[-+−])?[$€£¥₹]?
    (?P<digits>(?:[1-9]\d{{0,2}}(?:,\d{{3}})+|\d+)(?:\.\d+)?|(?<!\.)\.\d+)
    (?!\w|{_JOINS}\d)""",
    re.VERBOSE,
)
_NUMBER_ALONE = re.compile(rf"[$€£¥₹]?{_NUMBER.pattern}\s*[$€£¥₹%]?\.?", re.VERBOSE)
_BEFORE_ANSWER = "####"  # in GSM8K the solution comes first
_HELDOUT_SHARE = 5  # one question of so many is held out
_FORM = 1  # of problems in the cache; another number where `_problems` makes others of a row
_FEATURES = {"question": "string", "answer": "string", "is_number": "bool", "held_out": "bool"}
_TEXT: dict[str, Any] = {"max_length": 20_000, "charset": string.printable}

Split = Literal["train", "heldout", "all"]
_Problem = tuple[str, str | Decimal]


class QuestionsEnv(gymnasium.Env[str, str]):
    """One question of a data set; the action is the answer.

    Reward 1 for the right answer, else 0. Where the answer is a number, the last number of the
    action counts, so that a sentence may be around it; texts must be equal but for case and spaces.
    Numbers are as people write them: with a sign, thousands in commas, a currency's sign, a leading
    point; a per cent sign is no part of them. What letters or other digits touch is none: 12abc,
    1,2, 1/2, 1e3.

    Args:
        path: files (JSON Lines, JSON, CSV, Parquet, Arrow; also as patterns, `data/*.jsonl`), a
            folder of them, or a data set on the hub, as openai/gsm8k.
        subset: which of a data set's configurations, if it has several.
        data_split: which of its own splits is read, or a part of one: `train[:1000]`.
        revision: of the hub's, a commit, branch or tag.
        question, answer: the fields, dotted where they are within others: `prompt.0.content`. A
            question is a text, an answer a text or a number; of one with a `####` in it counts
            what follows that.
        split: `train`, `heldout`, or `all` of what is read; a question belongs to one of the first
            two, wherever it stands.

    The rows are read once on a machine, and then mapped from the library's cache. Raises
    ValueError, which names the option or the row, for what can't be asked.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (gymnasium's own type)
        "render_modes": [],
        "deterministic": True,
    }
    observation_space = spaces.Text(**_TEXT)  # of the class: one takes longer to make than all else
    action_space = spaces.Text(min_length=0, **_TEXT)

    def __init__(
        self,
        *,
        path: str | Sequence[str] = "",
        subset: str = "",
        data_split: str = "train",
        revision: str = "",
        question: str = "question",
        answer: str = "answer",
        split: Split = "train",
    ) -> None:
        if split not in ("train", "heldout", "all"):
            raise ValueError(f"split={split!r} must be 'train', 'heldout' or 'all'")
        for option, field in (("question", question), ("answer", answer)):
            if not isinstance(field, str) or not all(field.split(".")):
                raise ValueError(f"{option}={field!r} must name a field, dotted within others")
        source = RowSource.of(path, subset=subset, split=data_split, revision=revision)
        self._problems = _read(source, source.state(), question, answer)[split]
        if not self._problems:
            raise ValueError(f"{source} has no questions of split={split!r}: give more")
        self._answer: str | Decimal = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        question, self._answer = self._problems[seed % len(self._problems)]
        return question, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if isinstance(self._answer, Decimal):
            right = _last_number(action) == self._answer
        else:
            right = action.casefold().split() == self._answer.casefold().split()
        return "", float(right), True, False, {"success": right}


def _last_number(text: str) -> Decimal | None:
    numbers = list(_NUMBER.finditer(text))
    return _value(numbers[-1]) if numbers else None


def _value(number: re.Match[str]) -> Decimal:
    value = Decimal(number["digits"].replace(",", ""))
    return value if number["sign"] in (None, "+") else -value


@dataclass(frozen=True, slots=True)
class _Problems:
    """Those of a split: `rows` of a table that is mapped from a file."""

    table: Any  # pyarrow's
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> _Problem:
        row = self.rows[number]
        question, answer, is_number = (
            self.table.column(name)[row].as_py() for name in ("question", "answer", "is_number")
        )
        return question, Decimal(answer) if is_number else answer


@functools.lru_cache(maxsize=4)  # each episode makes an environment anew
def _read(source: RowSource, state: State, question: str, answer: str) -> Mapping[Split, _Problems]:
    """ValueError names the field, or the row and its field, that holds no problem."""
    rows = open_rows(source)
    import datasets  # noqa: PLC0415  (it is there, and has been imported)
    from datasets.fingerprint import Hasher  # noqa: PLC0415

    if not are_lines(rows):
        rows = rows.select_columns(_columns(rows, source, question=question, answer=answer))
    with without_bars():
        found = rows.map(
            _problems,
            batched=True,
            with_indices=True,
            fn_kwargs={"fields": (question, answer), "source": str(source)},
            remove_columns=rows.column_names,
            features=datasets.Features({k: datasets.Value(v) for k, v in _FEATURES.items()}),
            new_fingerprint=Hasher.hash((rows._fingerprint, question, answer, _FORM)),
        )
    held_out = found.data.column("held_out").to_numpy()
    every = np.arange(len(found))
    rows_of: dict[Split, np.ndarray] = {
        "train": every[~held_out],
        "heldout": every[held_out],
        "all": every,
    }
    return {split: _Problems(found.data, of_split) for split, of_split in rows_of.items()}


def _columns(rows: Any, source: RowSource, **fields: str) -> list[str]:
    """Those that the fields are in. ValueError if one is not there."""
    columns = {field.split(".")[0]: option for option, field in fields.items()}
    for column, option in columns.items():
        if column not in rows.column_names:
            raise ValueError(
                f"{source} has no field {column!r}: it has "
                f"{', '.join(map(repr, rows.column_names))}; name the one that is meant, "
                f"env.options.{option}"
            )
    return [*columns]


def _problems(
    columns: Mapping[str, Sequence[Any]],
    numbers: Sequence[int],
    *,
    fields: tuple[str, str],
    source: str,
) -> dict[str, list[Any]]:
    """The problems in a batch of rows, as columns of texts and what they mean."""
    found: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    try:
        for place, entry in entries(columns, numbers):
            try:
                question, answer = _problem(
                    _field(entry, fields[0]), _field(entry, fields[1]), fields
                )
                held_out = zlib.crc32(question.encode()) % _HELDOUT_SHARE == 0
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            found["question"].append(question)
            found["answer"].append(str(answer))
            found["is_number"].append(isinstance(answer, Decimal))
            found["held_out"].append(held_out)
    except UnicodeDecodeError as error:  # only the use of a column tells
        raise ValueError(f"{source} is not UTF-8 ({error}): save it as UTF-8") from error
    except ValueError as error:
        raise ValueError(f"{source}, {error}") from error
    return found


def _field(row: Mapping[str, Any], name: str) -> Any:
    """What is at a dotted name; a number is an item's place in a list."""
    value: Any = row
    for part in name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            raise ValueError(f"it has no {name!r}: {part!r} is not in {_shown(value)}")
    return value


def _problem(question: Any, answer: Any, fields: tuple[str, str]) -> _Problem:
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{fields[0]}={_shown(question)} must be a text that is not empty")
    if isinstance(answer, int | float | Decimal) and not isinstance(answer, bool):
        exact = Decimal(str(answer))
        if exact.is_finite():
            return question, exact
    if not isinstance(answer, str):
        raise ValueError(f"{fields[1]}={_shown(answer)} must be a text or a number")
    alone = answer.rpartition(_BEFORE_ANSWER)[2].strip()
    if not alone:
        raise ValueError(f"{fields[1]}={_shown(answer)} is empty, so that nothing could be right")
    number = _NUMBER_ALONE.fullmatch(alone)
    return question, _value(number) if number else alone


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"


gymnasium.register("flash/Questions-v0", entry_point="flash.envs.questions:QuestionsEnv")
