"""What was said in an episode that a crash cut off, so that another can go on from there.

    Episode.generate ─► Replay.sampled     the logged answer, if the prompt is the logged one
    Episode.observe ──► Replay.observed    nothing, if the observation is the logged one
                              └──────────► HistoryDiverged: the episode starts over

An episode does so only for an agent that asks for it: `Episode.replay_history`.
"""

import struct
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from flash.answers import shown
from flash.errors import HistoryDiverged
from flash.types import Completion, GenerateRequest, Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What the policy answered; `prompt_sum` tells to which prompt."""

    prompt_sum: int
    completion: Completion


History = Sequence[Observation | Sampled]
"""In its order: what the environment answered, and what the policy."""


class Replay:
    """Goes through a history beside what happens now. HistoryDiverged tells where they differ."""

    def __init__(self, history: History = ()) -> None:
        self._left = deque(history)

    def sampled(self, request: GenerateRequest) -> Completion | None:
        """The logged answer to that request; None where the history has ended."""
        if not self._left:
            return None
        logged = self._left.popleft()
        if not isinstance(logged, Sampled):
            raise HistoryDiverged("the policy is asked where an observation was logged")
        if logged.prompt_sum != prompt_sum(request.token_ids):
            raise HistoryDiverged(
                f"the prompt, of {len(request.token_ids)} tokens now, is not the logged one"
            )
        if (length := len(logged.completion.token_ids)) > request.sampling.max_tokens:
            raise HistoryDiverged(
                f"the logged response has {length} tokens, and now it may have "
                f"{request.sampling.max_tokens}"
            )
        return logged.completion

    def observed(self, observation: Observation) -> None:
        """The environment has answered."""
        if not self._left:
            return
        logged = self._left.popleft()
        if isinstance(logged, Sampled):
            raise HistoryDiverged("the environment is asked where a response was logged")
        if told := difference(observation, logged):
            raise HistoryDiverged(told)


def difference(now: Observation, logged: Observation) -> str:
    """Where two observations differ in what an agent or a metric can see; empty if nowhere."""
    before, after = _visible(logged), _visible(now)
    for name in before:
        if before[name] != after[name]:
            return _told(name, before[name], after[name])
    return ""


def _visible(observation: Observation) -> dict[str, object]:
    info = observation.info
    commands = info.get("admissible_commands")
    return {
        "text": observation.text,
        "reward": observation.reward,
        "terminated": observation.terminated,
        "truncated": observation.truncated,
        "goal": info.get("goal"),
        "admissible_commands": None if commands is None else list(commands),
        "success": info.get("success"),
    }


def _told(name: str, before: object, after: object) -> str:
    """Of long values what matters: from the first that is different."""
    if isinstance(before, str | list) and isinstance(after, str | list):
        equal = next(
            (place for place, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
            min(len(before), len(after)),
        )
        if equal:
            name, before, after = f"{name}[{equal}:]", before[equal:], after[equal:]
    return f"{name} is {shown(after)}, and {shown(before)} was logged"


def prompt_sum(token_ids: Sequence[int]) -> int:
    """The same for equal prompts; of others hardly ever."""
    return zlib.crc32(struct.pack(f"<{len(token_ids)}i", *token_ids))  # half of NumPy's time
