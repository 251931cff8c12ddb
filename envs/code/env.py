"""One problem after another, whose answer is code that is run in a sandbox."""

import functools
import re
import string
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import gymnasium
from gymnasium import spaces

from flash.sandbox import Limits
from flash.sandbox.choose import Kind, check_sandbox

from .problems import Problem, Test
from .testing import Result, Rules, tested

Rewards = Literal["all", "fraction"]

_BLOCK = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_AGAIN = "Mend it, and answer with the whole code in one block."
_TEXT: dict[str, Any] = {"max_length": 100_000, "charset": string.printable}
_PROCESSES = 32
_DISK_MB = 64
_OUTPUT_BYTES = 4_000_000


class ProblemEnv(gymnasium.Env[str, str]):
    """The action is an answer with code: its last fenced block, or all of it where it has none.

    The reward is 1 if the code passes all tests, public and hidden ones, else 0; with
    `rewards: fraction` the share of the hidden tests that it passes, of all where none are hidden.

    With more `turns` the public tests are tried first: if one fails, the next observation tells
    how, and another answer may follow. Hidden ones are tried once public ones pass, or at the last
    turn; what came of them is not told.

    It waits while code runs, so it belongs into `env.hosts`: each host has one answer in its
    sandbox at a time.
    """

    metadata: dict[str, Any] = {"render_modes": [], "blocks": True}  # noqa: RUF012  (gymnasium's)
    observation_space = spaces.Text(**_TEXT)  # of the class: one takes longer to make than all else
    action_space = spaces.Text(min_length=0, **_TEXT)

    def __init__(
        self,
        *,
        turns: int,
        rewards: Rewards,
        test_seconds: float,
        answer_seconds: float,
        memory_mb: int,
        tolerance: float,
        sandbox: Kind,
    ) -> None:
        one_of("rewards", rewards, ("all", "fraction"))
        one_of("sandbox", sandbox, ("local",))
        at_least("turns", turns, 1)
        at_least("memory_mb", memory_mb, 64)
        if not 0 < test_seconds <= answer_seconds:
            raise ValueError(
                f"test_seconds={test_seconds!r} must be above 0, and at most "
                f"answer_seconds={answer_seconds!r}"
            )
        if not 0 <= tolerance < 1:
            raise ValueError(f"tolerance={tolerance!r} must be 0 or more and below 1")
        _check_sandbox_once(sandbox)
        self._turns = turns
        self._fraction = rewards == "fraction"
        self._rules = Rules(
            sandbox=sandbox,
            limits=Limits(
                memory_mb=memory_mb,
                processes=_PROCESSES,
                disk_mb=_DISK_MB,
                output_bytes=_OUTPUT_BYTES,
            ),
            test_seconds=test_seconds,
            answer_seconds=answer_seconds,
            tolerance=tolerance,
            stop_early=not self._fraction,
        )
        self._problem: Problem | None = None
        self._hidden: Sequence[Test] = ()
        self._left = 0

    @abstractmethod
    def problem(self, seed: int) -> Problem:
        """Which one a seed stands for."""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._problem = self.problem(seed)
        self._hidden = self._problem.hidden_tests()
        self._left = self._turns
        return self._problem.question, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._problem is None or not self._left:
            raise RuntimeError("there is no problem to answer: call reset first")
        self._left -= 1
        code, public = code_of(action), self._problem.public
        if self._left:
            results = self._run(code, public)
            if not all(result.passed for result in results):
                said = next(result.said for result in results if not result.passed)
                return f"{said}\n\n{_AGAIN}", 0.0, False, False, self._info(results)
            results += self._run(code, self._hidden)
        else:
            results = self._run(code, [*public, *self._hidden])
        self._left = 0
        counted = results[len(public) :] or results
        share = sum(result.passed for result in counted) / len(counted)
        info = self._info(results)
        reward = share if self._fraction else float(info["success"])
        return "", reward, True, False, info

    def _run(self, code: str, tests: Sequence[Test]) -> list[Result]:
        assert self._problem is not None
        return tested(code, self._problem, tests, self._rules) if tests else []

    def _info(self, results: Sequence[Result]) -> dict[str, Any]:
        assert self._problem is not None
        tests = len(self._problem.public) + len(self._hidden)
        passed = sum(result.passed for result in results)
        return {"success": passed == tests, "passed": passed, "tests": tests}


def code_of(answer: str) -> str:
    """The last fenced block, or all of it if there is none."""
    blocks: list[str] = _BLOCK.findall(answer)
    return blocks[-1] if blocks else answer


def one_of(name: str, value: object, allowed: Sequence[str]) -> None:
    """ValueError with the option's name if it is none of them."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be {' or '.join(map(repr, allowed))}")


def at_least(name: str, value: object, least: int) -> None:
    """ValueError with the option's name if it is no whole number, or a smaller one."""
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")


_check_sandbox_once = functools.cache(check_sandbox)  # each episode makes an environment anew
