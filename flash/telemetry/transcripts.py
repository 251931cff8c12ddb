"""What was said in a run, of a few episodes of each step: a line each of transcripts.jsonl.

    {"step": 3, "episode": 17, "group": 4, "task_set": "", "seed": 12, "options": {},
     "reward": 1.0, "success": true, "turns": [{"read": "…", "said": "…", "reward": 1.0}, …]}

`step` is the one that trained it; `read` is what the policy read since its last words, as its
tokenizer writes the tokens, special ones too; a turn's `reward` is null where the agent tells none.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from flash.conversation import spoken_turns
from flash.rollout.episode import Episode
from flash.rollout.observer import Observer
from flash.rollout.record import EpisodeRecord
from flash.telemetry.folder import TRANSCRIPTS_FILE, read_lines
from flash.types import Task, Trajectory

_MOST_EPISODES = 2000  # of a run, so that its file has some 50 MB at most
_MOST_TOKENS = 4000  # of an episode; decoded in the event loop, in about 1 ms

Decode = Callable[[Sequence[int]], str]


class Transcripts(Observer):
    """Keeps the first trained episodes of a step, each of another group where there are as many.

    Args:
        write: is given each line.
        decode: from token ids to text.
        per_step, steps: episodes of a step, and steps of the run; if that is too many in all, only
            every second step has some, or every third …
    """

    def __init__(
        self,
        write: Callable[[Mapping[str, Any]], None],
        *,
        decode: Decode,
        per_step: int,
        steps: int,
    ) -> None:
        self._write = write
        self._decode = decode
        self._per_step = per_step
        self._every = max(1, math.ceil(per_step * steps / _MOST_EPISODES))
        self._version = -1
        self._groups: set[int] = set()

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        version, trajectory = record.trained_at_version, episode.trajectory
        if version is None or trajectory is None or version % self._every:
            return
        if version != self._version:
            self._version, self._groups = version, set()
        if len(self._groups) == self._per_step or record.group in self._groups:
            return
        self._groups.add(record.group)
        self._write(
            {
                "step": version + 1,
                "episode": record.episode,
                "group": record.group,
                "task_set": record.task_set,
                "seed": record.seed,
                "options": {name: str(value) for name, value in episode.task.options.items()},
                "reward": record.reward,
                "success": record.success,
                "turns": _turns(trajectory, self._decode),
            }
        )


def _turns(trajectory: Trajectory, decode: Decode) -> list[dict[str, Any]]:
    turns = spoken_turns(trajectory.sequences)
    most = max(2, _MOST_TOKENS // max(1, 2 * len(turns)))
    if sum(len(turn.read) + len(turn.said) for turn in turns) <= _MOST_TOKENS:
        most = _MOST_TOKENS
    rewards = trajectory.turn_rewards if len(trajectory.turn_rewards) == len(turns) else ()
    return [
        {
            **({"role": turn.role} if turn.role else {}),
            "read": _text(turn.read, decode, most),
            "said": _text(turn.said, decode, most),
            "reward": rewards[number] if rewards else None,
        }
        for number, turn in enumerate(islice(turns, _MOST_TOKENS // 2))
    ]


def _text(token_ids: list[int], decode: Decode, most: int) -> str:
    """Of more tokens than `most` their beginning and end."""
    left_out = len(token_ids) - most
    if left_out <= 0:
        return decode(token_ids)
    half = most // 2
    first, last = decode(token_ids[:half]), decode(token_ids[-half:])
    return f"{first} […{left_out} tokens…] {last}"


def shown(run: Path, step: int | None, task_set: str | None = None) -> str:
    """The transcripts of a step of a run, to be read; by default those of the last that has some.

    With `task_set` those of that set only. ValueError if there are none.
    """
    path = run / TRANSCRIPTS_FILE
    if not path.exists():
        raise ValueError(f"{path} is not there: give the folder of a run, runs/NAME")
    lines = read_lines(path)
    try:
        return _of_step(path, _of_set(path, lines, task_set), step)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not as a run writes it: {error!r}") from error


def _of_set(
    path: Path, lines: Sequence[Mapping[str, Any]], task_set: str | None
) -> Sequence[Mapping[str, Any]]:
    if task_set is None:
        return lines
    of_sets: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        of_sets.setdefault(line.get("task_set", ""), []).append(line)
    if task_set not in of_sets:
        known = ", ".join(filter(None, of_sets)) or "no task set"
        raise ValueError(f"--task-set {task_set}: {path} has transcripts of {known}")
    return of_sets[task_set]


def _of_step(path: Path, lines: Sequence[Mapping[str, Any]], step: int | None) -> str:
    steps = sorted({line["step"] for line in lines})
    if not steps:
        raise ValueError(f"{path} has no transcript yet (transcripts=0 keeps none)")
    if step is not None and step not in steps:
        near = min(steps, key=lambda known: abs(known - step))
        raise ValueError(f"--step {step}: {path} has none of that step: try {near}")
    wanted = steps[-1] if step is None else step
    return "\n\n".join(_page(line) for line in lines if line["step"] == wanted)


def _page(line: Mapping[str, Any]) -> str:
    options = f", options {line['options']}" if line["options"] else ""
    ended = ", success" if line["success"] else ""
    task = Task(line["seed"], task_set=line.get("task_set", ""))
    parts = [
        f"═══ step {line['step']}, episode {line['episode']} of group {line['group']}, "
        f"{task}{options}: reward {line['reward']:g}{ended}"
    ]
    for number, turn in enumerate(line["turns"], start=1):
        reward = "" if turn["reward"] is None else f", reward {turn['reward']:g}"
        who = f"{turn['role']} " if turn.get("role") else ""
        parts += [
            f"─── turn {number}, {who}read",
            printable(turn["read"]),
            f"─── turn {number}, {who}said{reward}",
            printable(turn["said"]),
        ]
    return "\n".join(parts)


def printable(text: Iterable[str]) -> str:
    """Nothing that was said moves the cursor, or hides what stands before it."""
    return "".join(
        letter if letter in "\n\t" or letter.isprintable() else ascii(letter)[1:-1]
        for letter in text
    )
