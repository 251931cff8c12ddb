"""Problems with tests, from files in the shapes that people have.

    MBPP             text or prompt, test_list, challenge_test_list, test_setup_code, test_imports;
                     code, whose functions are those that are asked for
    LiveCodeBench    question_content, starter_code, public_test_cases, private_test_cases, metadata
    APPS, TACO, verl a question, and inputs, outputs and fn_name, which may be JSON in a field

Which one an entry has is told by its fields.
"""

import base64
import binascii
import contextlib
import functools
import io
import json
import logging
import pickle
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..rows import RowSource, State, entries, open_rows
from .assertions import Assertion, defined, functions, split, stands_alone

logger = logging.getLogger(__name__)

Split = Literal["train", "heldout", "all"]

_HOW = "Answer with Python code in one block, ```python … ```."
_HELDOUT_SHARE = 5  # one problem of so many is held out
_MOST_BYTES = 1 << 28  # of the private tests of a problem, unpacked
_MODULES = (
    *("string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random"),
    *("statistics", "itertools", "functools", "operator", "io", "sys", "json", "typing"),
    "builtins",  # the last, so that none of its names is another's
)
# What LiveCodeBench lets solutions take for granted; in one line, so that lines keep their places.
PRELUDE = "; ".join(
    [f"from {module} import *; import {module}" for module in _MODULES]
    + ["sys.setrecursionlimit(50_000)"]
)


@dataclass(frozen=True, slots=True)
class Program:
    """What a program reads, and what it should write."""

    stdin: str
    stdout: str


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a function, with plain data of JSON; any of `expected` is right."""

    name: str
    arguments: Sequence[Any]
    expected: Sequence[Any]


Test = Program | Call | Assertion


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A question and its tests, all of one kind.

    prelude, setup: code that runs before an answer's and after it.
    judge_setup: code that runs before assertions are judged, where no answer's code is.
    packed: more hidden tests, as LiveCodeBench packs them.
    """

    question: str  # all that an answer's author is told
    public: tuple[Test, ...]
    hidden: tuple[Test, ...]
    prelude: str = ""
    setup: str = ""
    judge_setup: str = ""
    packed: str = field(default="", repr=False)
    function: str = ""  # of packed tests

    def hidden_tests(self) -> tuple[Test, ...]:
        """All of them. ValueError if those that are packed can't be read, or there are no tests."""
        tests = self.hidden + _cases(unpacked(self.packed), self.function, "private_test_cases")
        if not (self.public or tests):
            raise ValueError("private_test_cases is empty, and so is public_test_cases")
        return tests


@dataclass(frozen=True, slots=True)
class Problems:
    """Those in rows of these numbers; a row is read anew each time, for it may be large."""

    rows: Any  # a Dataset, mapped from a file
    numbers: Sequence[int]
    public: int

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> Problem:
        number = self.numbers[place]
        ((_, entry),) = entries(self.rows[number : number + 1], [number])
        return of_entry(entry, self.public)


def read(source: RowSource, *, split: Split, public: int, unusable: str) -> Problems:
    """The problems of files or a data set. ValueError names the row, and what is wrong.

    Args:
        public: so many tests are shown, where the row does not tell which.
        unusable: `refuse` a problem that can't be tested, or `skip` those, and say so.
    """
    problems = _read(source, source.state(), public, unusable == "skip")[split]
    if not len(problems):
        raise ValueError(f"{source} has no {split} problems: give more")
    return problems


def split_of(question: str) -> Split:
    """A question belongs to one of them, wherever it stands."""
    return "heldout" if zlib.crc32(question.encode()) % _HELDOUT_SHARE == 0 else "train"


@functools.lru_cache(maxsize=4)  # each episode makes an environment anew
def _read(source: RowSource, state: State, public: int, skip: bool) -> Mapping[Split, Problems]:
    rows = open_rows(source)
    numbers: dict[Split, list[int]] = {"train": [], "heldout": [], "all": []}
    skipped = list[str]()
    for number, place, entry in _each(rows, source):
        try:
            of_split = split_of(of_entry(entry, public).question)
        except (ValueError, RecursionError) as error:
            mistake = f"{source}, {place}: {error}"
            if not skip:
                raise ValueError(mistake) from error
            skipped.append(mistake)
        else:
            numbers[of_split].append(number)
            numbers["all"].append(number)
    if skipped:
        total = len(skipped) + len(numbers["all"])
        logger.warning("%d of %d problems are left out: %s", len(skipped), total, skipped[0])
    return {chosen: Problems(rows, found, public) for chosen, found in numbers.items()}


def _each(rows: Any, source: RowSource) -> Iterator[tuple[int, str, Any]]:
    """Of each row its number, its place in words, and what is in it."""
    for number in range(len(rows)):
        try:
            for place, entry in entries(rows[number : number + 1], [number]):  # none if blank
                yield number, place, entry
        except ValueError as error:
            raise ValueError(f"{source}, {error}") from error


# ── shapes ───────────────────────────────────────────────────────────────────────────────────


def of_entry(entry: Any, public: int) -> Problem:
    """A problem of any of the shapes. ValueError names the field, and what it must be."""
    if not isinstance(entry, Mapping):
        raise ValueError("it is not an object with a question and tests")
    if "test_list" in entry:
        return _of_mbpp(entry, public)
    if "public_test_cases" in entry:
        return _of_livecodebench(entry)
    return _of_inputs(entry, public)


def _of_mbpp(entry: Mapping[str, Any], public: int) -> Problem:
    imports = "\n".join(_texts(entry, "test_imports"))
    setup = _text(entry, "test_setup_code")
    judge_setup = imports
    try:
        known = defined(imports)
        if stands_alone(setup, known):  # else it makes use of what the answer defines
            known |= defined(setup)
            judge_setup = f"{imports}\n{setup}"
    except ValueError as error:
        raise ValueError(f"test_imports or test_setup_code: {error}") from error
    asked_for = frozenset[str]()
    with contextlib.suppress(ValueError):  # it need not be there
        asked_for = functions(_text(entry, "code"))
    tests = list[Test]()
    for name in ("test_list", "challenge_test_list"):
        for number, source in enumerate(_texts(entry, name)):
            try:
                tests.append(split(source, known, asked_for))
            except ValueError as error:
                raise ValueError(f"{name}[{number}]={_shown(source)}: {error}") from error
    if not tests:
        raise ValueError("test_list is empty, so that nothing could be right")
    shown = "\n".join(test.source for test in tests[:public] if isinstance(test, Assertion))
    return Problem(
        question=(
            f"{_question(entry)}\n\nIt is tested like this:\n```python\n{shown}\n```\n\n{_HOW}"
        ),
        public=tuple(tests[:public]),
        hidden=tuple(tests[public:]),
        setup=f"{imports}\n{setup}",
        judge_setup=judge_setup,
    )


def _of_livecodebench(entry: Mapping[str, Any]) -> Problem:
    metadata = _object(entry.get("metadata") or {}, "metadata")
    function = _text(metadata, "func_name")
    shown = _cases(_json(entry["public_test_cases"]), function, "public_test_cases")
    private = entry.get("private_test_cases") or []
    packed = private if isinstance(private, str) and not private.lstrip().startswith("[") else ""
    hidden = () if packed else _cases(_json(private), function, "private_test_cases")
    if not (shown or hidden or packed):
        raise ValueError("public_test_cases and private_test_cases are empty: give tests")
    return Problem(
        question=_asked(entry, function),
        public=shown,
        hidden=hidden,
        packed=packed,
        function=function,
        prelude=PRELUDE,
    )


def _of_inputs(entry: Mapping[str, Any], public: int) -> Problem:
    found = _inputs(entry)
    inputs, outputs = found["inputs"], found.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError("inputs and outputs must be lists, of a test each")
    if len(inputs) != len(outputs) or not inputs:
        raise ValueError(
            f"it has {len(inputs)} inputs and {len(outputs)} outputs: give as many of both, and "
            f"one at least"
        )
    function = _text(found, "fn_name")
    make = functools.partial(_call, function) if function else _program
    tests = [make(given, wanted) for given, wanted in zip(inputs, outputs, strict=True)]
    return Problem(
        question=_asked(entry, function),
        public=tuple(tests[:public]),
        hidden=tuple(tests[public:]),
        prelude=PRELUDE,
    )


def _inputs(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """What has the inputs: the entry itself, or JSON in it."""
    places = {"input_output": entry.get("input_output")}
    if isinstance(entry.get("reward_model"), Mapping):
        places["reward_model.ground_truth"] = entry["reward_model"].get("ground_truth")
    for name, value in {"": entry, **places}.items():
        found = _object(value, name) if value else {}
        if "inputs" in found:
            return found
    raise ValueError(
        "it has no tests: give test_list (as MBPP), public_test_cases (as LiveCodeBench) or inputs "
        "and outputs (as APPS and TACO, also as JSON in input_output or reward_model.ground_truth);"
        f" it has {', '.join(map(repr, entry)) or 'none'}"
    )


def _call(function: str, given: Any, wanted: Any) -> Call:
    arguments = [_json(line) for line in given.split("\n")] if isinstance(given, str) else given
    expected = _json(wanted) if isinstance(given, str) and isinstance(wanted, str) else wanted
    if not isinstance(arguments, list):
        raise ValueError(f"inputs has {_shown(given)}: it must be a list of {function}'s arguments")
    # In APPS some are in a list of their own, and some are not.
    alone = expected if isinstance(expected, list) and len(expected) == 1 else []
    return Call(function, arguments, [expected, *alone])


def _program(given: Any, wanted: Any) -> Program:
    texts = ["\n".join(each) if _is_texts(each) else each for each in (given, wanted)]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f"inputs and outputs have {_shown(text)}: what a program reads and writes must be "
                f"a text, or a list of its lines; what is called needs a fn_name"
            )
    return Program(*texts)


def _cases(cases: Any, function: str, name: str) -> tuple[Test, ...]:
    """LiveCodeBench's: of a program or, with `function`, calls with an argument in each line."""
    if not isinstance(cases, list):
        raise ValueError(f"{name} must be a list of tests")
    tests = list[Test]()
    for number, case in enumerate(cases):
        match case:
            case {"input": str(given), "output": str(wanted), "testtype": "stdin"}:
                tests.append(Program(given, wanted))
            case {"input": str(given), "output": str(wanted), "testtype": "functional"} if function:
                arguments = [_json(line) for line in given.split("\n")]
                tests.append(Call(function, arguments, [_json(wanted)]))
            case _:
                raise ValueError(
                    f"{name}[{number}]={_shown(case)} must have input and output, which are texts, "
                    f"and testtype: stdin, or functional where metadata has a func_name"
                )
    return tuple(tests)


# ── questions ────────────────────────────────────────────────────────────────────────────────


def _asked(entry: Mapping[str, Any], function: str) -> str:
    parts = [_question(entry)]
    starter = _text(entry, "starter_code").rstrip()
    if function:
        parts.append(f"Write the function {function!r}.")
    else:
        parts.append("Write a program that reads standard input and writes standard output.")
    if starter:
        parts.append(f"Begin with this:\n```python\n{starter}\n```")
    parts.append(_HOW)
    return "\n\n".join(parts)


def _question(entry: Mapping[str, Any]) -> str:
    for name in ("question_content", "question", "problem", "prompt", "text"):
        value = entry.get(name)
        if isinstance(value, list):  # messages
            contents = [m.get("content") for m in value if isinstance(m, Mapping)]
            value = "\n\n".join(each for each in contents if isinstance(each, str))
        if isinstance(value, str) and value.strip():
            return value.strip()
    raise ValueError(
        "it has no question: give question, problem, prompt, text or question_content; it has "
        + ", ".join(map(repr, entry))
    )


# ── fields ───────────────────────────────────────────────────────────────────────────────────


def unpacked(text: str) -> Any:
    """Tests of LiveCodeBench: a pickle of a text of JSON, packed by zlib, in base64.

    A pickle runs what it names, so one that names anything is refused.
    """
    if not text:
        return []
    try:
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(base64.b64decode(text), _MOST_BYTES)
        if not unpacking.eof:
            raise ValueError(f"it is not whole, or more than {_MOST_BYTES} bytes")
        value = _TextsAlone(io.BytesIO(content)).load()
        if not isinstance(value, str):
            raise ValueError("it holds no text")
        return _json(value)
    except (ValueError, binascii.Error, zlib.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"private_test_cases can't be unpacked: {error}") from error


class _TextsAlone(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"its pickle names {module}.{name}, and may hold a text alone")


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"{_shown(value)} is not JSON: {error}") from error


def _object(value: Any, name: str) -> Mapping[str, Any]:
    found = _json(value)
    if not isinstance(found, Mapping):
        raise ValueError(f"{name}={_shown(value)} must be an object, or JSON of one")
    return found


def _text(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name) or ""
    if not isinstance(value, str):
        raise ValueError(f"{name}={_shown(value)} must be a text")
    return value


def _texts(entry: Mapping[str, Any], name: str) -> list[str]:
    value = entry.get(name) or []
    if not _is_texts(value):
        raise ValueError(f"{name}={_shown(value)} must be a list of texts")
    return list(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"
