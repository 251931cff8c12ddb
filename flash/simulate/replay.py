"""The episodes of a real run, to be played again."""

import bisect
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SLOW = ("stale", "too_slow", "redundant")


@dataclass(frozen=True, slots=True)
class RecordedEpisode:
    """What an episode of a run did. Tokens and seconds are totals over its turns.

    `ended_s` is when it got its reward, or was cut off: then `reward` is None.
    """

    number: int
    task: int
    turns: int
    prompt_tokens: int
    generated_tokens: int
    env_s: float
    generate_s: float
    reward_s: float
    reward: float | None
    admitted_s: float
    ended_s: float
    trained_at: int | None

    @classmethod
    def of(cls, line: Mapping[str, Any]) -> "RecordedEpisode":
        stages = line["stages_s"]
        return cls(
            number=line["episode"],
            task=line["seed"],
            turns=line["turns"],
            prompt_tokens=line["prompt_tokens"],
            generated_tokens=line["generated_tokens"],
            env_s=stages.get("env", 0.0),
            generate_s=stages.get("generate", 0.0),
            reward_s=stages.get("reward", 0.0),
            reward=line["reward"],
            admitted_s=line["admitted_s"],
            ended_s=line["ended_s"] - stages.get("wait", 0.0),
            trained_at=line["trained_at_version"],
        )


def played(run: Path) -> list[RecordedEpisode]:
    """The run's episodes that came to their ends. ValueError if there is none."""
    episodes = _recorded(run, lambda line: line["reward"] is not None and line["turns"])
    if not episodes:
        raise ValueError(
            f"{run}/episodes.jsonl holds no episode that came to its end: name the folder of a "
            f"run that trained"
        )
    return episodes


def cut_off(run: Path) -> list[RecordedEpisode]:
    """The run's episodes that were given up for being slow, as far as they got: without them a
    replay would be too quick."""
    return _recorded(run, lambda line: line["outcome"] == "cancelled" and line["reason"] in _SLOW)


def _recorded(run: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> list[RecordedEpisode]:
    """Episodes of the run's file. ValueError for a line that this version did not write."""
    from flash.telemetry.folder import read_lines  # noqa: PLC0415  (much, of which help needs none)

    path = run / "episodes.jsonl"
    episodes: list[RecordedEpisode] = []
    for number, line in enumerate(read_lines(path), start=1):
        try:
            if wanted(line):
                episodes.append(RecordedEpisode.of(line))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}, line {number} is no episode ({error!r}): name a folder that a run of "
                f"this version made"
            ) from error
    return episodes


class Replay:
    """Gives each task its own episodes of the run, in their order, and then any others.

    One that was cut off is thought to have gone on like an episode that lasted longer than it did
    until then.
    """

    def __init__(
        self, episodes: Sequence[RecordedEpisode], cut_off: Iterable[RecordedEpisode] = ()
    ) -> None:
        self._whole = list(episodes)
        self._by_life = sorted(episodes, key=_life_s)
        self._of_task: dict[int, list[RecordedEpisode]] = {}
        self._cut_off = set(cut_off)
        for episode in sorted([*episodes, *self._cut_off], key=lambda e: e.number):
            self._of_task.setdefault(episode.task, []).append(episode)

    def episode(self, task: int, attempt: int, rng: random.Random) -> RecordedEpisode:
        """The task's n-th one, from 0."""
        own = self._of_task.get(task, ())
        if attempt >= len(own):
            return rng.choice(self._whole)
        episode = own[attempt]
        if episode not in self._cut_off:
            return episode
        longer = bisect.bisect_right(self._by_life, _life_s(episode), key=_life_s)
        return rng.choice(self._by_life[longer:] or self._by_life[-1:])


def _life_s(episode: RecordedEpisode) -> float:
    return episode.ended_s - episode.admitted_s
