"""Formulas in words, to be written in Python: code with tests, for policies of any size.

    Write f(x, y, z) in Python: the sum of x and the product of y and 3
    def f ( x , y , z ) : return ( x + ( y * 3 ) )

An author of `demonstrate` may be absent-minded.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from flash.sandbox.choose import Kind
from flash.types import Observation, Task, Turn

from .env import ProblemEnv, Rewards, at_least, one_of
from .problems import Call, Problem, split_of

_HEAD = "def f ( x , y , z ) : return"
_ASKED = "Write f(x, y, z) in Python:"
_LEAVES = ("x", "y", "z", *map(str, range(2, 10)))
_TESTS = 8


@dataclass(frozen=True, slots=True)
class _Operator:
    words: str
    code: str  # with places for both sides
    value: Callable[[int, int], int]


_OPERATORS = (
    _Operator("the sum of {} and {}", "( {} + {} )", lambda a, b: a + b),
    _Operator("the difference of {} and {}", "( {} - {} )", lambda a, b: a - b),
    _Operator("the product of {} and {}", "( {} * {} )", lambda a, b: a * b),
    _Operator("the larger of {} and {}", "max ( {} , {} )", max),
    _Operator("the smaller of {} and {}", "min ( {} , {} )", min),
)


@dataclass(frozen=True, slots=True)
class Formula:
    """An operator between two others, or a `leaf`: a name or a number."""

    leaf: str = ""
    operator: _Operator = _OPERATORS[0]
    sides: "tuple[Formula, ...]" = ()

    def words(self) -> str:
        return self.leaf or self.operator.words.format(*(side.words() for side in self.sides))

    def code(self) -> str:
        return self.leaf or self.operator.code.format(*(side.code() for side in self.sides))

    def value(self, names: Mapping[str, int]) -> int:
        if self.leaf:
            return names[self.leaf] if self.leaf in names else int(self.leaf)
        return self.operator.value(*(side.value(names) for side in self.sides))

    def slipped(self, rng: random.Random, slips: float) -> "Formula":
        """As somebody has it who takes another sign for each with this probability."""
        other = rng.random() < slips
        if self.leaf:
            return Formula(rng.choice(_LEAVES)) if other else self
        operator = rng.choice(_OPERATORS) if other else self.operator
        return Formula("", operator, tuple(side.slipped(rng, slips) for side in self.sides))


class FormulasEnv(ProblemEnv):
    """One formula after another; all else is as in ProblemEnv.

    Args:
        operators: of a formula, at most.
        split: `train` or `heldout`; a formula belongs to one of them, whatever the seed.
        slips: how often `demonstrate` takes one sign for another, which is imitated: what a policy
            learns from an absent-minded author, and reinforcement then removes.
        turns, rewards, test_seconds, answer_seconds, memory_mb, sandbox: see CodeEnv.

    Raises ValueError for an option that can't be, and for a machine that lacks something.
    """

    def __init__(
        self,
        *,
        operators: int = 2,
        split: Literal["train", "heldout"] = "train",
        slips: float = 0.0,
        turns: int = 1,
        rewards: Rewards = "all",
        test_seconds: float = 6.0,
        answer_seconds: float = 30.0,
        memory_mb: int = 512,
        sandbox: Kind = "local",
    ) -> None:
        at_least("operators", operators, 1)
        one_of("split", split, ("train", "heldout"))
        if not 0 <= slips < 1:
            raise ValueError(f"slips={slips!r} must be 0 or more and below 1")
        super().__init__(
            turns=turns,
            rewards=rewards,
            test_seconds=test_seconds,
            answer_seconds=answer_seconds,
            memory_mb=memory_mb,
            tolerance=0.0,
            sandbox=sandbox,
        )
        self._operators = operators
        self._split = split
        self._slips = slips

    def problem(self, seed: int) -> Problem:
        rng, formula = self._formula(seed)
        tests = list[Call]()
        for _ in range(_TESTS):
            names = {name: rng.randint(-9, 9) for name in "xyz"}
            tests.append(Call("f", list(names.values()), [formula.value(names)]))
        return Problem(question=_asked(formula), public=tuple(tests[:1]), hidden=tuple(tests[1:]))

    def _formula(self, seed: int) -> tuple[random.Random, Formula]:
        """The first of the seed that belongs to the split, and the generator that it came from."""
        rng = random.Random(f"formula {seed}")
        while True:
            formula = _generated(rng, rng.randint(1, self._operators))
            if split_of(_asked(formula)) == self._split:
                return rng, formula

    # ── for a small policy ───────────────────────────────────────────────────────────────────

    def vocabulary(self) -> list[str]:
        """Every word of questions and answers; what all have in common is one."""
        operators = ["(", ")", "+", "-", "*", "max", "min", ","]
        words = [each.words.partition("{}")[0] for each in _OPERATORS]
        return [_ASKED, _HEAD, *words, *_LEAVES, *operators]

    def demonstrate(self, task: Task) -> list[Turn]:
        """The formula in Python, with the slips that were asked for."""
        _, formula = self._formula(task.seed)
        written = formula.slipped(random.Random(f"demonstrate {task.seed}"), self._slips)
        return [Turn(Observation(text=_asked(formula)), f"{_HEAD} {written.code()}")]


def _asked(formula: Formula) -> str:
    return f"{_ASKED} {formula.words()}"


def _generated(rng: random.Random, operators: int) -> Formula:
    if operators == 0:
        return Formula(rng.choice(_LEAVES))
    left = rng.randrange(operators)
    sides = (_generated(rng, left), _generated(rng, operators - 1 - left))
    return Formula("", rng.choice(_OPERATORS), sides)
