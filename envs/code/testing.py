"""An answer's code against tests, in sandboxes: what it is asked is there, what is right is here.

    Program    a run for each, with its input; what it wrote is compared here
    Call       all of them in one run; the values are compared here
    Assertion  likewise; the values are judged in a second sandbox, in which that code never was

What the code prints besides, which tests it counts as passed and how it exits is of no account.
"""

import contextlib
import functools
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib import resources
from typing import Any

from flash.sandbox import Limits, Outcome, open_sandbox
from flash.sandbox.blocking import BlockingSandbox
from flash.sandbox.choose import Kind

from .assertions import Assertion
from .inside import SETUP_FAILED, decoded
from .problems import Call, Problem, Program, Test

_PYTHON = ("python3", "-I")  # led by no variables, and by no files beside it
_PROGRAM = "program.py"
_MORE_OUTPUT = 65_536  # bytes, beside twice what is right
_SHOWN = 600  # characters of an input, an output or an error in what is told
_JUDGE_S = 30.0
_LATE = "It took too long."
_NOT_REACHED = "It was not reached: those before it took too long, or ended the process."


@dataclass(frozen=True, slots=True)
class Result:
    """Of a test; `said` is what the author of a wrong answer is told."""

    passed: bool
    said: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How answers are tested.

    test_seconds: of a program's run; of calls, which share a run, that times their number.
    answer_seconds: of all tests of an answer; those that are not reached then have failed.
    tolerance: of a printed number with a point, relative and absolute.
    stop_early: once a program has failed a test it has failed those after it.
    """

    sandbox: Kind
    limits: Limits
    test_seconds: float
    answer_seconds: float
    tolerance: float
    stop_early: bool


def tested(code: str, problem: Problem, tests: Sequence[Test], rules: Rules) -> list[Result]:
    """A result for each test, in their order. EnvFailure if there is no sandbox any more."""
    source = f"{problem.prelude}\n{code}"
    programs = [test for test in tests if isinstance(test, Program)]
    asked = [test for test in tests if isinstance(test, Call | Assertion)]
    with _opened(rules) as sandbox:
        ran = _programs(source, programs, sandbox, rules) if programs else []
        if not asked:
            return ran
        lines, failure = _answers(source, problem.setup, asked, sandbox, rules)
    given = [list(itertools.islice(lines, len(_requests(test)))) for test in asked]
    passed = _passed(problem, asked, given, rules)
    answered = (
        Result(well, "" if well else _told(test, values, failure))
        for test, values, well in zip(asked, given, passed, strict=True)
    )
    of_programs = iter(ran)
    return [next(of_programs if isinstance(test, Program) else answered) for test in tests]


def _opened(rules: Rules) -> "contextlib.closing[BlockingSandbox]":
    return contextlib.closing(BlockingSandbox(open_sandbox(rules.sandbox, limits=rules.limits)))


# ── programs ─────────────────────────────────────────────────────────────────────────────────


def _programs(
    source: str, tests: Sequence[Program], sandbox: BlockingSandbox, rules: Rules
) -> list[Result]:
    sandbox.write(_PROGRAM, source.encode(errors="replace"))
    due = time.monotonic() + rules.answer_seconds
    results = list[Result]()
    for test in tests:
        seconds = min(rules.test_seconds, due - time.monotonic())
        if seconds <= 0 or (rules.stop_early and results and not results[-1].passed):
            results.append(Result(False, _NOT_REACHED))
            continue
        outcome = sandbox.run(
            [*_PYTHON, _PROGRAM],
            stdin=test.stdin.encode(),
            seconds=seconds,
            output_bytes=2 * len(test.stdout.encode()) + _MORE_OUTPUT,
        )
        results.append(_ran(test, outcome, rules.tolerance))
    return results


def _ran(test: Program, outcome: Outcome, tolerance: float) -> Result:
    written = outcome.stdout.decode(errors="replace")
    ended = outcome.ended == "exited" and outcome.returncode == 0 and not outcome.cut
    if ended and same_output(written, test.stdout, tolerance):
        return Result(True)
    why = "" if ended else f"\n{_why(outcome)}"
    return Result(
        False,
        f"Input:\n{_cut(test.stdin)}\nExpected output:\n{_cut(test.stdout)}\n"
        f"Your output:\n{_cut(written)}{why}",
    )


def _why(outcome: Outcome) -> str:
    """How it ended, if not well."""
    if outcome.ended == "deadline":
        return _LATE
    if outcome.ended == "memory":
        return "It took too much memory."
    if outcome.cut:
        return "It wrote too much."
    said = outcome.stderr.decode(errors="replace").strip()
    return f"It exited with {outcome.returncode}: {said[-_SHOWN:]}"


def same_output(written: str, wanted: str, tolerance: float = 0.0) -> bool:
    """As LiveCodeBench compares: line by line but for spaces around each, or as numbers.

    Lines whose words are all numbers are the same if those are equal: 1.50 is 1.5. One with a point
    in what is wanted may be off by `tolerance`, relative or absolute.
    """
    lines, wanted_lines = written.strip().split("\n"), wanted.strip().split("\n")
    return len(lines) == len(wanted_lines) and all(
        line.strip() == other.strip() or _same_numbers(line.split(), other.split(), tolerance)
        for line, other in zip(lines, wanted_lines, strict=True)
    )


def _same_numbers(words: Sequence[str], wanted: Sequence[str], tolerance: float) -> bool:
    if len(words) != len(wanted):
        return False
    room = Decimal(tolerance)
    try:
        for word, other in zip(words, wanted, strict=True):
            number, right = Decimal(word), Decimal(other)
            allowed = room * max(Decimal(1), abs(right)) if "." in other else Decimal(0)
            if not abs(number - right) <= allowed:
                return False
    except ArithmeticError:  # no number, or none that can be compared
        return False
    return True


# ── calls and assertions ─────────────────────────────────────────────────────────────────────


def _answers(
    source: str,
    setup: str,
    tests: Sequence[Call | Assertion],
    sandbox: BlockingSandbox,
    rules: Rules,
) -> tuple[Iterator[str], str]:
    """A line for each request that it came to, and why it came to no more."""
    requests = [request for test in tests for request in _requests(test)]
    outcome = _inside(
        "answer",
        {"code": source, "setup": setup, "requests": requests},
        sandbox,
        seconds=min(rules.test_seconds * len(tests), rules.answer_seconds),
    )
    *lines, _ = outcome.stdout.decode(errors="replace").split("\n")
    return iter(lines[: len(requests)]), _why(outcome)


def _requests(test: Call | Assertion) -> list[dict[str, Any]]:
    if isinstance(test, Call):
        return [{"call": test.name, "arguments": test.arguments}]
    return [{"expression": expression} for expression in test.expressions]


def _passed(
    problem: Problem,
    tests: Sequence[Call | Assertion],
    given: Sequence[Sequence[str]],
    rules: Rules,
) -> list[bool]:
    """Of each test, with the lines that came of it."""
    whole = [
        {"test": test.test, "values": lines}
        for test, lines in zip(tests, given, strict=True)
        if isinstance(test, Assertion) and len(lines) == len(test.expressions)
    ]
    judged = whole or problem.judge_setup.strip()  # which may fail, and not by the answer
    holds = iter(_judged(problem.judge_setup, whole, rules) if judged else ())
    return [
        _as_expected(test, lines)
        if isinstance(test, Call)
        else len(lines) == len(test.expressions) and next(holds)
        for test, lines in zip(tests, given, strict=True)
    ]


def _judged(setup: str, assertions: Sequence[dict[str, Any]], rules: Rules) -> list[bool]:
    """Whether each holds. RuntimeError if the problem's own code fails."""
    with _opened(rules) as sandbox:
        told = {"setup": setup, "assertions": assertions}
        outcome = _inside("judge", told, sandbox, seconds=_JUDGE_S)
    if outcome.returncode == SETUP_FAILED:
        raise RuntimeError(f"the tests' own set-up failed: {_why(outcome)}")
    if outcome.returncode != 0:  # values that are too large for a test, say
        return [False] * len(assertions)
    holds: list[bool] = json.loads(outcome.stdout)
    return holds


def _inside(
    role: str, told: dict[str, Any], sandbox: BlockingSandbox, *, seconds: float
) -> Outcome:
    return sandbox.run(
        [*_PYTHON, "-c", _program_inside(), role],
        stdin=json.dumps(told).encode(),
        seconds=seconds,
    )


@functools.cache
def _program_inside() -> str:
    return resources.files(__package__).joinpath("inside.py").read_text(encoding="utf-8")


def _told(test: Call | Assertion, lines: Sequence[str], failure: str) -> str:
    if len(lines) < len(_requests(test)):
        return f"{_cut(_shown(test))}\n{failure or _NOT_REACHED}"
    came = "\n".join(f"It was {_came(line)}" for line in lines)
    return f"{_cut(_shown(test))}\n{came}"


def _as_expected(test: Call, lines: Sequence[str]) -> bool:
    try:
        value = json.loads(json.dumps(decoded(json.loads(lines[0])["value"])))  # tuples are lists
        return value in test.expected
    except Exception:  # the boundary: whatever wrote the line may have written anything, or none
        return False


def _shown(test: Call | Assertion) -> str:
    if isinstance(test, Assertion):
        return test.source
    arguments = ", ".join(map(repr, test.arguments))
    return f"{test.name}({arguments}) should be {test.expected[0]!r}."


def _came(line: str) -> str:
    """What came of a request, as its author reads it."""
    try:
        told = json.loads(line)
        return _cut(repr(decoded(told["value"])) if "value" in told else str(told["raised"]))
    except Exception:  # the boundary, as above
        return "unreadable."


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
