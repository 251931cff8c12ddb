"""Questions with known answers, from a file: RLVR on GSM8K and the like."""

import functools
import json
import re
import string
import zlib
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import gymnasium
from gymnasium import spaces

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BEFORE_ANSWER = "####"  # in GSM8K the solution comes first
_HELDOUT_SHARE = 5  # one question of so many is held out


class QuestionsEnv(gymnasium.Env[str, str]):
    """One question of the file; the action is the answer.

    Reward 1 for the right answer, else 0. Of answers that are numbers the last number of the action
    counts, so that a sentence may be around it; others must be equal but for case and spaces.

    Args:
        path: a file of JSON Lines, each with a `question` and an `answer`; where the answer has a
            `####` in it, what follows that.
        split: `train` or `heldout`; a question belongs to one of them, wherever it stands.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (gymnasium's own type)

    def __init__(self, *, path: str = "", split: Literal["train", "heldout"] = "train") -> None:
        if split not in ("train", "heldout"):
            raise ValueError(f"split={split!r} must be 'train' or 'heldout'")
        if not path:
            raise ValueError(
                "path is missing: give a file of JSON Lines, as in GSM8K's train.jsonl"
            )
        self._problems = [
            (question, answer)
            for question, answer in _read(path)
            if (zlib.crc32(question.encode()) % _HELDOUT_SHARE == 0) == (split == "heldout")
        ]
        if not self._problems:
            raise ValueError(f"path={path!r} has no {split} questions: give a longer file")
        self.observation_space = spaces.Text(max_length=20_000, charset=string.printable)
        self.action_space = spaces.Text(max_length=20_000, min_length=0, charset=string.printable)
        self._answer = ""

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        question, self._answer = self._problems[seed % len(self._problems)]
        return question, {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        right = _value(action) == _value(self._answer)
        if _NUMBER.fullmatch(self._answer) is None:
            right = action.casefold().split() == self._answer.casefold().split()
        return "", float(right), True, False, {"success": right}


def _value(text: str) -> Decimal | None:
    """Of the last number."""
    numbers = _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


@functools.lru_cache(maxsize=4)  # each episode makes an environment anew
def _read(path: str) -> list[tuple[str, str]]:
    """Questions and answers. ValueError names the line that holds none."""
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"path={path!r} can't be read: {error.strerror}") from error
    problems = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            question, answer = str(entry["question"]), str(entry["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'path={path!r}, line {number} is not {{"question": …, "answer": …}}: {error!r}'
            ) from error
        problems.append((question, answer.rpartition(_BEFORE_ANSWER)[2].strip()))
    return problems


gymnasium.register("flash/Questions-v0", entry_point="flash.envs.questions:QuestionsEnv")
