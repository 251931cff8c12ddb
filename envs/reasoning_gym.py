"""Single-turn problems with verified answers, from reasoning_gym: RLVR in its smallest form."""

import string
import warnings
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import gymnasium
from gymnasium import spaces

from flash.types import Observation, Task, Turn

_PROBLEMS = 1_000_000  # indices a seed is taken modulo of; problems are made one at a time
_HELDOUT_SHARE = 5  # one question of so many is held out
_VOCABULARY_PROBLEMS = 3_000


class ReasoningGymEnv(gymnasium.Env[str, str]):
    """One problem of a reasoning_gym dataset; the action is the answer.

    Reward 1 if the dataset's verifier gives the answer its full mark, else 0: its partial marks
    reward an answer that merely contains the solution, which teaches a policy to spray.

    Args:
        dataset: the dataset's name, for example `chain_sum`.
        config: its settings, for example `{max_terms: 2, max_digits: 1}`.
        split: `train` or `heldout`; a question belongs to one of them, whatever the seed.
    """

    # Not "deterministic": five of 106 datasets, ransom_note say, go by a set's order.
    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (gymnasium's own type)

    def __init__(
        self,
        *,
        dataset: str = "chain_sum",
        config: Mapping[str, Any] | None = None,
        split: Literal["train", "heldout"] = "train",
    ) -> None:
        if split not in ("train", "heldout"):
            raise ValueError(f"split={split!r} must be 'train' or 'heldout'")
        with warnings.catch_warnings():
            # A dependency of reasoning_gym compares strings with `is`.
            warnings.simplefilter("ignore", SyntaxWarning)
            import reasoning_gym  # noqa: PLC0415  (an extra; slow to import)
        if dataset not in reasoning_gym.factory.DATASETS:
            raise ValueError(
                f"dataset={dataset!r} is not one of reasoning_gym's "
                f"{len(reasoning_gym.factory.DATASETS)} datasets"
            )
        self._dataset = reasoning_gym.create_dataset(
            dataset, seed=0, size=_PROBLEMS, **(config or {})
        )
        self.observation_space = spaces.Text(max_length=20_000, charset=string.printable)
        self.action_space = spaces.Text(max_length=20_000, min_length=0, charset=string.printable)
        self._split = split
        self._entry: dict[str, Any] | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._entry = self._problem(seed)
        return str(self._entry["question"]), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        assert self._entry is not None, "reset comes before step"
        mark = float(self._dataset.score_answer(action.strip(), self._entry))
        return "", float(mark >= 1.0), True, False, {"success": mark >= 1.0}

    # ── for a small policy ───────────────────────────────────────────────────────────────────

    def vocabulary(self) -> list[str]:
        """The words of a few thousand questions and answers; enough for the small datasets."""
        words: set[str] = set()
        for index in range(_VOCABULARY_PROBLEMS):
            entry = self._dataset[index]
            words.update(str(entry["question"]).split(), str(entry["answer"]).split())
        return sorted(words)

    def demonstrate(self, task: Task) -> list[Turn]:
        """The question and its answer."""
        text, info = self.reset(seed=task.seed, options=dict(task.options))
        assert self._entry is not None
        return [Turn(Observation(text=text, info=info), str(self._entry["answer"]))]

    def _problem(self, seed: int) -> dict[str, Any]:
        """The first problem from the seed's index on that belongs to the split."""
        for attempt in range(10_000):
            # A prime stride, so that the searches of neighbouring seeds don't meet.
            entry: dict[str, Any] = self._dataset[(seed + attempt * 7919) % _PROBLEMS]
            held_out = zlib.crc32(str(entry["question"]).encode()) % _HELDOUT_SHARE == 0
            if held_out == (self._split == "heldout"):
                return entry
        raise ValueError(f"no {self._split} problem found: this dataset has too few questions")


gymnasium.register("flash/ReasoningGym-v0", entry_point="flash.envs.reasoning_gym:ReasoningGymEnv")
