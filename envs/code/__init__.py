"""Code with tests: problems from a file, or generated formulas."""

from collections.abc import Sequence
from typing import Literal

import gymnasium

from flash.sandbox.choose import Kind

from ..rows import RowSource
from .env import ProblemEnv, Rewards, at_least, one_of
from .formulas import FormulasEnv
from .problems import Problem, Split, read

__all__ = ["CodeEnv", "FormulasEnv"]


class CodeEnv(ProblemEnv):
    """One problem of a file; all else is as in ProblemEnv.

    Args:
        path, subset, data_split, revision: files of problems, a folder of them, or a data set on
            the hub, as of QuestionsEnv; rows are in one of the shapes of `problems.py`.
        split: `train`, `heldout`, or `all` of them; a question belongs to one of the first two.
        turns: answers in an episode, at most.
        rewards: `all` or `fraction`.
        public_tests: so many tests of a problem are public, where the file does not tell which.
        unusable: `refuse` a file in which a problem can't be tested, or `skip` such problems.
        test_seconds, answer_seconds, tolerance: see `Rules`.
        memory_mb: of an answer's processes.
        sandbox: where code runs.

    Raises ValueError for an option that can't be, and for a file or a machine that lacks something.
    """

    def __init__(
        self,
        *,
        path: str | Sequence[str] = "",
        subset: str = "",
        data_split: str = "train",
        revision: str = "",
        split: Split = "train",
        public_tests: int = 1,
        unusable: Literal["refuse", "skip"] = "refuse",
        turns: int = 1,
        rewards: Rewards = "all",
        test_seconds: float = 6.0,
        answer_seconds: float = 30.0,
        memory_mb: int = 512,
        tolerance: float = 0.0,
        sandbox: Kind = "local",
    ) -> None:
        one_of("split", split, ("train", "heldout", "all"))
        one_of("unusable", unusable, ("refuse", "skip"))
        at_least("public_tests", public_tests, 1)
        source = RowSource.of(path, subset=subset, split=data_split, revision=revision)
        self._problems = read(source, split=split, public=public_tests, unusable=unusable)
        super().__init__(
            turns=turns,
            rewards=rewards,
            test_seconds=test_seconds,
            answer_seconds=answer_seconds,
            memory_mb=memory_mb,
            tolerance=tolerance,
            sandbox=sandbox,
        )

    def problem(self, seed: int) -> Problem:
        return self._problems[seed % len(self._problems)]


gymnasium.register("flash/Code-v0", entry_point="flash.envs.code:CodeEnv")
gymnasium.register("flash/Formulas-v0", entry_point="flash.envs.code:FormulasEnv")
