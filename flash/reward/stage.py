"""The stage between an episode's last turn and its end: a scorer, with room, deadline and retries.

    agent: … last turn ─► RewardStage ─► Trajectory with that reward
                             │ room for `concurrency`; each attempt has `timeout_s`
                             ├─ FunctionScorer    a coroutine function, in this process
                             ├─ RewardProcesses   any function, in processes that can be killed
                             └─ Judge             a language model: the policy, or one at a URL

No other episode waits for it, and its environment is closed by then. Whatever goes wrong fails the
episode (reward); it never becomes a reward of 0.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from flash.answers import failing_as, raised
from flash.errors import EpisodeFailure, FlashError, RewardFailure
from flash.reward.outcome import outcome
from flash.rollout.episode import Episode
from flash.types import Task, Trajectory, Transcript

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S = 0.5

Decode = Callable[[Sequence[int]], str]


class Scorer(Protocol):
    """Computes a reward.

    The answer is a number, or a mapping with `reward` and, if it is to replace what the
    environment said, `success`. Raises TimeoutError after `timeout_s`, and anything else for
    anything else.
    """

    async def __call__(self, transcript: Transcript, *, timeout_s: float) -> Any: ...


class FunctionScorer:
    """A coroutine function of the episode, in this process: it must not block."""

    def __init__(self, function: Callable[[Transcript], Awaitable[Any]]) -> None:
        self._function = function

    async def __call__(self, transcript: Transcript, *, timeout_s: float) -> Any:
        async with asyncio.timeout(timeout_s):
            with failing_as(RewardFailure, "the reward"):
                return await self._function(transcript)


class RewardStage:
    """Gives ended episodes their reward.

    >>> stage = RewardStage(FunctionScorer(score), decode=tokenizer.decode, timeout_s=10)
    >>> agent = EnvironmentAgent(envs=envs, style=style, reward_stage=stage, max_tokens=64)

    Args:
        decode: from token ids to text.
        concurrency: episodes that are scored at a time; others wait, first come first served.
        timeout_s: for one attempt, not counting the wait for its turn.
        retries: attempts after the first.
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        decode: Decode,
        concurrency: int = 16,
        timeout_s: float = 60.0,
        retries: int = 1,
    ) -> None:
        if concurrency < 1 or retries < 0 or not timeout_s > 0:
            raise ValueError(
                f"concurrency={concurrency} must be at least 1, retries={retries} at least 0, "
                f"timeout_s={timeout_s:g} above 0"
            )
        self._scorer = scorer
        self._decode = decode
        self._room = asyncio.Semaphore(concurrency)
        self._timeout_s = timeout_s
        self._retries = retries

    async def __call__(self, episode: Episode, trajectory: Trajectory) -> Trajectory:
        """The trajectory with its reward. RewardFailure once every attempt has failed."""
        with episode.stage("reward"):
            transcript = transcript_of(episode.task, trajectory, self._decode)
            async with self._room:
                reward, success = await self._score(episode, transcript)
        return replace(
            trajectory,
            reward=reward,
            success=trajectory.success if success is None else success,
            # It is known at the end, so it follows the last turn.
            turn_rewards=[0.0] * (trajectory.turns - 1) + [reward] if trajectory.turns else (),
        )

    async def _score(self, episode: Episode, transcript: Transcript) -> tuple[float, bool | None]:
        for attempt in range(self._retries + 1):
            if attempt:
                await asyncio.sleep(_FIRST_BACKOFF_S * 2 ** (attempt - 1))
            try:
                return await scored(self._scorer, transcript, timeout_s=self._timeout_s)
            except RewardFailure as failure:
                cause = failure
            logger.warning("the reward of %s, attempt %d: %s", episode.session, attempt + 1, cause)
        raise RewardFailure(
            f"the reward failed {self._retries + 1} times; the last time: {cause}"
        ) from cause


async def scored(
    scorer: Scorer, transcript: Transcript, *, timeout_s: float
) -> tuple[float, bool | None]:
    """Reward and, if it is told, success, by one attempt. RewardFailure for what goes wrong in it;
    what is nobody's fault here passes: no worker is left, say."""
    try:
        return outcome(await scorer(transcript, timeout_s=timeout_s), "the reward")
    except TimeoutError as error:
        raise RewardFailure(f"it took longer than timeout_s={timeout_s:g}") from error
    except Exception as error:  # the boundary to the user's function
        if isinstance(error, RewardFailure):
            raise
        if isinstance(error, FlashError) and not isinstance(error, EpisodeFailure):
            raise
        raise RewardFailure(f"it {raised(error)}") from error


def transcript_of(task: Task, trajectory: Trajectory, decode: Decode) -> Transcript:
    """An episode as a scorer sees it."""
    sequences = trajectory.sequences
    return Transcript(
        task=task,
        text="\n\n".join(decode(s.token_ids.tolist()) for s in sequences),
        responses=tuple(decode(ids) for s in sequences for sampled, ids in s.runs() if sampled),
        reward=trajectory.reward,
        success=trajectory.success,
    )
