"""Single-turn problems with verified answers, from reasoning_gym: RLVR in its smallest form."""

import math
import random
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gymnasium

from flash.types import Observation, Task, Turn

from .of_package import PackageEnv, Split, importing

with importing():
    import reasoning_gym
    from reasoning_gym.factory import CURRICULA, DATASETS, create_curriculum

_PROBLEMS = 1_000_000  # indices a seed is taken modulo of; problems are made one at a time
_FEWER = {"acre": 1_000, "word_ladder": 1_000}  # these make all of them at once
_HELDOUT_SHARE = 5  # one question of so many is held out
_VOCABULARY_PROBLEMS = 3_000


@dataclass(frozen=True)
class _Set:
    """A data set, which makes its problems one at a time, and how many it is good for."""

    problems: Any
    size: int


class ReasoningGymEnv(PackageEnv):
    """One problem of a reasoning_gym dataset; the action is the answer.

    Reward 1 if the dataset's verifier gives the answer its full mark, else 0: its partial marks
    reward an answer that merely contains the solution, which teaches a policy to spray. An answer
    that the verifier fails to read earns 0.

    Args:
        dataset: the dataset's name, for example `chain_sum`.
        config: its settings, for example `{max_terms: 2, max_digits: 1}`.
        level: what `config` leaves open is as hard as that level of the dataset's own curriculum.
        datasets: several in the place of one: `{name: {weight: 2, config: {}, level: 0}}`, each
            of which may be left out. The seed decides from which one a problem is.
        split: `train` or `heldout`; a question belongs to one of them, whatever the seed.
    """

    # Not "deterministic": five of 106 datasets, ransom_note say, go by a set's order.

    def __init__(
        self,
        *,
        dataset: str | None = None,
        config: Mapping[str, Any] | None = None,
        level: int | None = None,
        datasets: Mapping[str, Mapping[str, Any]] | None = None,
        split: Split = "train",
    ) -> None:
        super().__init__(split)
        if datasets is None:
            datasets = {dataset or "chain_sum": {"config": config, "level": level}}
        elif dataset is not None or config is not None or level is not None:
            raise ValueError("datasets has dataset, config and level of its own: give either")
        if not datasets:
            raise ValueError("datasets={} has none: name one or more")
        with self.apart(), importing():
            self._sets = {name: _make(name, dict(given)) for name, given in datasets.items()}
        self._weights = [_weight(name, given) for name, given in datasets.items()]
        self._entry: dict[str, Any] | None = None
        self._of = next(iter(self._sets))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        seed = self.seed_of(seed)
        self._of = random.Random(seed).choices(list(self._sets), self._weights)[0]
        with self.apart(seed):
            self._entry = self._problem(self._sets[self._of], seed)
        return str(self._entry["question"]), {
            "dataset": self._of,
            "metadata": self._entry["metadata"],
        }

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        assert self._entry is not None, "reset comes before step"
        info: dict[str, Any] = {"dataset": self._of}
        problems = self._sets[self._of].problems
        with self.apart():
            try:
                mark = float(problems.score_answer(action.strip(), self._entry))
            except Exception as error:  # the boundary: some verifiers raise at what is no answer
                mark, info["unreadable"] = 0.0, str(error)
        return "", float(mark >= 1.0), True, False, {**info, "success": mark >= 1.0}

    # ── for a small policy ───────────────────────────────────────────────────────────────────

    def vocabulary(self) -> list[str]:
        """The words of a few thousand questions and answers; enough for the small datasets."""
        words: set[str] = set()
        for one in self._sets.values():
            for index in range(min(_VOCABULARY_PROBLEMS, one.size)):
                entry = one.problems[index]
                words.update(str(entry["question"]).split(), str(entry["answer"]).split())
        return sorted(words)

    def demonstrate(self, task: Task) -> list[Turn]:
        """The question and its answer."""
        text, info = self.reset(seed=task.seed, options=dict(task.options))
        assert self._entry is not None
        return [Turn(Observation(text=text, info=info), str(self._entry["answer"]))]

    def _problem(self, one: _Set, seed: int) -> dict[str, Any]:
        """The first problem from the seed's index on that belongs to the split."""
        for attempt in range(10_000):
            # A prime stride, so that the searches of neighbouring seeds don't meet.
            entry: dict[str, Any] = one.problems[(seed + attempt * 7919) % one.size]
            held_out = zlib.crc32(str(entry["question"]).encode()) % _HELDOUT_SHARE == 0
            if held_out == (self._split == "heldout"):
                return entry
        raise ValueError(f"no {self._split} problem found: this dataset has too few questions")


def _make(name: str, given: dict[str, Any]) -> _Set:
    unknown = given.keys() - {"weight", "config", "level"}
    if unknown:
        raise ValueError(f"datasets.{name} has {sorted(unknown)}: it takes weight, config, level")
    if name not in DATASETS:
        raise ValueError(f"dataset={name!r} is not one of reasoning_gym's {len(DATASETS)} datasets")
    config = {"seed": 0, "size": _FEWER.get(name, _PROBLEMS), **(given.get("config") or {})}
    if (level := given.get("level")) is not None:
        config = {**_of_level(name, level), **config}
    try:
        return _Set(reasoning_gym.create_dataset(name, **config), config["size"])
    except (AssertionError, TypeError) as error:
        raise ValueError(f"the config or level of dataset {name} is wrong: {error}") from error


def _of_level(name: str, level: int) -> dict[str, Any]:
    """The settings that a level of the dataset's curriculum decides."""
    if name not in CURRICULA:
        raise ValueError(f"level={level!r}: {name} has no curriculum: write its config")
    curriculum = create_curriculum(name)
    most = max(len(attribute.levels) for attribute in curriculum.attributes.values()) - 1
    if level not in range(most + 1):
        raise ValueError(f"level={level!r} of {name} must be between 0 and {most}")
    for attribute in curriculum.attributes.values():
        curriculum.set_attr_level(attribute.name, min(level, len(attribute.levels) - 1))
    return dict(vars(curriculum.generate_configuration()))


def _weight(name: str, given: Mapping[str, Any]) -> float:
    weight = given.get("weight", 1)
    if not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"datasets.{name}.weight={weight!r} must be a number above 0")
    return weight


gymnasium.register("flash/ReasoningGym-v0", entry_point="flash.envs.reasoning_gym:ReasoningGymEnv")
