"""The actor that lives one episode at a time: reset → (generate → step)* → reward."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, TypeVar

from flash.conversation import TokenSequence
from flash.errors import AgentFailure, EnvFailure, RewardFailure
from flash.rollout.episode import Episode
from flash.types import (
    AsyncEnv,
    EnvSource,
    Observation,
    PromptStyle,
    SamplingParams,
    Trajectory,
)

from .actor import Actor, RewardStage

_T = TypeVar("_T")
Reward = Callable[[Sequence[Observation]], Awaitable[float]]


class EnvironmentAgent(Actor):
    """Plays episodes: one coroutine, one mailbox, one environment open at a time.

    Args:
        envs: where environments come from.
        style: turns observations into prompt tokens and sampled tokens into actions.
        max_tokens: of one response.
        max_turns: responses in an episode; None leaves the end to the environment.
        max_sequence_tokens: an episode whose conversation would grow past it ends there, with the
            reward it has.
        samples: what an episode is trained as: the conversation as one sample, or a sample for
            each turn, in which only that turn's response is trained on.
        step_timeout_s, episode_timeout_s: past them the episode fails (env, deadline).
        reward: computes the episode's reward from all its observations; by default the sum of
            what the environment gave.
        reward_timeout_s: past it the episode fails (reward).
        reward_stage: computes it after that, from what was read and said: see `flash/reward/`.
    """

    def __init__(
        self,
        *,
        envs: EnvSource,
        style: PromptStyle,
        max_tokens: int,
        max_turns: int | None = None,
        max_sequence_tokens: int = 32_768,
        temperature: float = 1.0,
        samples: Literal["whole", "turns"] = "whole",
        step_timeout_s: float = 60.0,
        episode_timeout_s: float = 1800.0,
        reward: Reward | None = None,
        reward_timeout_s: float = 60.0,
        reward_stage: RewardStage | None = None,
    ) -> None:
        super().__init__(episode_timeout_s=episode_timeout_s, reward_stage=reward_stage)
        self._envs = envs
        self._style = style
        self._max_tokens = max_tokens
        self._max_turns = max_turns
        self._max_sequence_tokens = max_sequence_tokens
        self._temperature = temperature
        self._a_sample_a_turn = samples == "turns"
        self._step_timeout_s = step_timeout_s
        self._reward = reward
        self._reward_timeout_s = reward_timeout_s

    async def play(self, episode: Episode) -> Trajectory:
        """One whole episode; a subclass may live it differently."""
        with episode.stage("env"):
            env = await self._within_step("open", self._envs.open())
        try:
            return await self._play_in(env, episode)
        finally:
            env.close()

    async def _play_in(self, env: AsyncEnv, episode: Episode) -> Trajectory:
        with episode.stage("env"):
            seen = [await self._within_step("reset", env.reset(episode.task))]
        conversation = TokenSequence(self._style.first(seen[0]))
        turns: list[TokenSequence] = []
        if len(conversation.token_ids) >= self._max_sequence_tokens:
            raise AgentFailure(
                f"the first prompt has {len(conversation.token_ids)} tokens, which leaves no room "
                f"to answer in max_sequence_tokens={self._max_sequence_tokens}"
            )
        while not seen[-1].done and (self._max_turns is None or episode.turns < self._max_turns):
            room = self._max_sequence_tokens - len(conversation.token_ids)
            if room <= 0:
                break
            sampling = SamplingParams(
                max_tokens=min(self._max_tokens, room),
                temperature=self._temperature,
                stop_token_ids=self._style.stop_token_ids,
            )
            completion = await episode.generate(conversation.token_ids, sampling)
            if self._a_sample_a_turn:
                turn = TokenSequence(conversation.token_ids)
                turn.add_sampled(completion, turn=episode.turns - 1)
                turns.append(turn)
            conversation.add_sampled(completion)
            with episode.stage("env"):
                action = self._style.action(completion.token_ids)
                seen.append(await self._within_step("step", env.step(action)))
            if not seen[-1].done:
                conversation.add_prompt(self._style.next(seen[-1], completion.token_ids))
        with episode.stage("reward"):
            reward = await self._reward_of(seen)
        return Trajectory(
            sequences=[part.snapshot() for part in turns or [conversation]],
            reward=reward,
            turns=episode.turns,
            success=bool(seen[-1].info.get("success", reward > 0)),
            turn_rewards=self._turn_rewards(seen, reward),
            turn_states=[observation.text for observation in seen[: episode.turns]],
        )

    async def _within_step(self, what: str, awaitable: Awaitable[_T]) -> _T:
        try:
            async with asyncio.timeout(self._step_timeout_s):
                return await awaitable
        except TimeoutError as error:
            raise EnvFailure(
                f"{what} took longer than step_timeout_s={self._step_timeout_s:g}"
            ) from error

    def _turn_rewards(self, seen: Sequence[Observation], reward: float) -> list[float]:
        """What followed each turn; a reward computed at the end followed the last one."""
        if self._reward is None:
            return [observation.reward for observation in seen[1:]]
        return [0.0] * (len(seen) - 2) + [reward] if len(seen) > 1 else []

    async def _reward_of(self, seen: Sequence[Observation]) -> float:
        if self._reward is None:
            return float(sum(observation.reward for observation in seen))
        try:
            async with asyncio.timeout(self._reward_timeout_s):
                return float(await self._reward(seen))
        except TimeoutError as error:
            raise RewardFailure(
                f"the reward took longer than reward_timeout_s={self._reward_timeout_s:g}"
            ) from error
        except Exception as error:  # the boundary to the user's function
            raise RewardFailure(f"the reward function raised {error!r}") from error
