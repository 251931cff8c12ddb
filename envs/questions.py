"""Questions with known answers, from a file: RLVR on GSM8K and the like."""

import functools
import json
import re
import string
import zlib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, NoReturn

import gymnasium
from gymnasium import spaces

_JOINS = r"[-+−–.,/:^×]"  # between digits they make a date, a range, a fraction …, and no number
_NUMBER = re.compile(
    rf"""(?<!\w)(?<!\d{_JOINS})             # not within a word, or within such
    (?P<sign>(?<![)\]])[-+−])?[$€£¥₹]?
    (?P<digits>(?:[1-9]\d{{0,2}}(?:,\d{{3}})+|\d+)(?:\.\d+)?|(?<!\.)\.\d+)
    (?!\w|{_JOINS}\d)""",
    re.VERBOSE,
)
_NUMBER_ALONE = re.compile(rf"[$€£¥₹]?{_NUMBER.pattern}\s*[$€£¥₹%]?\.?", re.VERBOSE)
_LINE_END = re.compile(r"\r\n|\r|\n")  # no others: U+2028 may stand in a text of JSON
_BEFORE_ANSWER = "####"  # in GSM8K the solution comes first
_HELDOUT_SHARE = 5  # one question of so many is held out
_TEXT: dict[str, Any] = {"max_length": 20_000, "charset": string.printable}

_Problem = tuple[str, str | Decimal]


class QuestionsEnv(gymnasium.Env[str, str]):
    """One question of the file; the action is the answer.

    Reward 1 for the right answer, else 0. Where the answer is a number, the last number of the
    action counts, so that a sentence may be around it; texts must be equal but for case and spaces.
    Numbers are as people write them: with a sign, thousands in commas, a currency's sign, a leading
    point; a per cent sign is no part of them. What letters or other digits touch is none: 12abc,
    1,2, 1/2, 1e3.

    Args:
        path: a file of JSON Lines in UTF-8, or a Parquet file (`.parquet`); each line or row has a
            `question` and an `answer`, a text or a number; where the answer has a `####` in it,
            what follows that. It is read once.
        split: `train` or `heldout`; a question belongs to one of them, wherever it stands.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (gymnasium's own type)
        "render_modes": [],
        "deterministic": True,
    }
    observation_space = spaces.Text(**_TEXT)  # of the class: one takes longer to make than all else
    action_space = spaces.Text(min_length=0, **_TEXT)

    def __init__(self, *, path: str = "", split: Literal["train", "heldout"] = "train") -> None:
        if split not in ("train", "heldout"):
            raise ValueError(f"split={split!r} must be 'train' or 'heldout'")
        if not path:
            raise ValueError(
                "path is missing: give a file of JSON Lines, as in GSM8K's train.jsonl, or Parquet"
            )
        try:
            state = Path(path).expanduser().stat()
        except OSError as error:
            raise ValueError(f"path={path!r} can't be read: {error.strerror}") from error
        self._problems = _read(path, state.st_mtime_ns, state.st_size)[split]
        if not self._problems:
            raise ValueError(f"path={path!r} has no {split} questions: give a longer file")
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


@functools.lru_cache(maxsize=4)  # each episode makes an environment anew
def _read(path: str, changed_ns: int, size: int) -> dict[str, list[_Problem]]:
    """The problems of each split. ValueError names the line, and its field, that holds none."""
    found: dict[str, list[_Problem]] = {"train": [], "heldout": []}
    in_rows = Path(path).suffix == ".parquet"
    for number, entry in _rows(path) if in_rows else _lines(path):
        try:
            question, answer = _problem(entry if in_rows else _parsed(entry))
            held_out = zlib.crc32(question.encode()) % _HELDOUT_SHARE == 0
        except (ValueError, RecursionError) as error:
            unit = "row" if in_rows else "line"
            raise ValueError(f"path={path!r}, {unit} {number}: {error}") from error
        found["heldout" if held_out else "train"].append((question, answer))
    return found


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Those that are not blank, with their numbers."""
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ValueError(f"path={path!r} can't be read: {error.strerror}") from error
    if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) or b"\0" in content[:1000]:
        raise ValueError(f"path={path!r} is UTF-16, or no text: save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = len(_LINE_END.split(content[: error.start].decode("latin-1")))
        raise ValueError(
            f"path={path!r}, line {wrong} is not UTF-8 ({error.reason}): save the file as UTF-8"
        ) from error
    for number, line in enumerate(_LINE_END.split(text), start=1):
        if line.strip():
            yield number, line


def _rows(path: str) -> Iterator[tuple[int, Any]]:
    """Of a Parquet file, with their numbers, from 1."""
    try:
        import pyarrow  # noqa: PLC0415
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(
            f"path={path!r} needs pyarrow, which is not installed ({error}): "
            "pip install 'flash-rl[parquet]', or give JSON Lines"
        ) from error
    number = 0
    try:
        with parquet.ParquetFile(Path(path).expanduser()) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"path={path!r} can't be read as Parquet: {error}") from error


def _parsed(line: str) -> Any:
    try:
        return json.loads(
            line, parse_int=Decimal, parse_float=Decimal, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg} at character {error.pos + 1}") from error


def _problem(entry: Any) -> _Problem:
    if not isinstance(entry, dict):
        raise ValueError('it is not an object {"question": …, "answer": …}')
    for field in ("question", "answer"):
        if field not in entry:
            raise ValueError(f"it has no {field!r}; it has {', '.join(map(repr, entry)) or 'none'}")
    question, answer = entry["question"], entry["answer"]
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question={_shown(question)} must be a text that is not empty")
    if isinstance(answer, int | float) and not isinstance(answer, bool):  # of Parquet
        answer = Decimal(str(answer))
    if isinstance(answer, Decimal) and answer.is_finite():
        return question, answer
    if not isinstance(answer, str):
        raise ValueError(f"answer={_shown(answer)} must be a text or a number")
    alone = answer.rpartition(_BEFORE_ANSWER)[2].strip()
    if not alone:
        raise ValueError(f"answer={_shown(answer)} is empty, so that nothing could be right")
    number = _NUMBER_ALONE.fullmatch(alone)
    return question, _value(number) if number else alone


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


gymnasium.register("flash/Questions-v0", entry_point="flash.envs.questions:QuestionsEnv")
