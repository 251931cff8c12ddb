"""The actor that lives one episode at a time: reset → (generate → step)* → reward.

With tools a response may call some; their results are what it reads next, in place of a step's. A
call of an environment's tool may be a step, too.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from flash.answers import failing_as, shown
from flash.conversation import TokenSequence, longest_text
from flash.deadline import Deadline
from flash.errors import AgentFailure, EnvFailure, RewardFailure
from flash.reward.outcome import outcome
from flash.rollout.episode import Episode
from flash.tools.environment import EnvTools
from flash.tools.tool import CallingStyle, Said, Toolbox
from flash.tools.toolset import Toolset
from flash.types import (
    AsyncEnv,
    Completion,
    EnvSource,
    Observation,
    PromptStyle,
    SampledSequence,
    SamplingParams,
    Trajectory,
)

from .actor import Actor, RewardStage

_CHARS_AT_ONCE = 10_000  # tokenised in the event loop: about 8 ms
# One thread: several would take the interpreter from the event loop in turns.
_LONG_TEXTS = ThreadPoolExecutor(1, "long texts")

_T = TypeVar("_T")
Reward = Callable[[Sequence[Observation]], Awaitable[float]]


class EnvironmentAgent(Actor):
    """Plays episodes: one coroutine, one mailbox, one environment open at a time.

    An episode with a history goes on from where that ends, if the environment is deterministic.

    Args:
        envs: where environments come from.
        style: turns observations into prompt tokens and sampled tokens into actions; with tools
            a CallingStyle that knows them.
        max_tokens: of one response.
        max_turns: responses in an episode; None leaves the end to the environment.
        max_sequence_tokens: of a conversation. An observation after which no token could be
            sampled within it is not read: the episode ends before it, with the reward it has. So
            does one of more than 32 characters for each of these tokens, or 4 million, which is
            not tokenised.
        experts: completions tell which experts tokens were routed to.
        samples: what an episode is trained as: the conversation as one sample, or a sample for
            each turn, in which only that turn's response is trained on.
        step_timeout_s, episode_timeout_s: past them the episode fails (env, deadline).
        reward: computes the episode's reward from all its observations; by default the sum of
            what the environment gave.
        reward_timeout_s: past it the episode fails (reward).
        tools: what the policy can call, as often as `max_turns` responses allow. A response with
            calls is followed by their results, and the rewards of those that were steps.
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
        experts: bool = False,
        step_timeout_s: float = 60.0,
        episode_timeout_s: float = 1800.0,
        reward: Reward | None = None,
        reward_timeout_s: float = 60.0,
        tools: Toolset | None = None,
        reward_stage: RewardStage | None = None,
    ) -> None:
        super().__init__(episode_timeout_s=episode_timeout_s, reward_stage=reward_stage)
        self._envs = envs
        self._style = style
        self._max_turns = max_turns
        self._max_sequence_tokens = max_sequence_tokens
        self._sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=temperature,
            stop_token_ids=style.stop_token_ids,
        )
        self._a_sample_a_turn = samples == "turns"
        self._experts = experts
        self._step_timeout_s = step_timeout_s
        self._reward = reward
        self._reward_timeout_s = reward_timeout_s
        self._tools = tools
        if tools is not None and not isinstance(style, CallingStyle):
            raise ValueError("tools are for a style that reads calls: use ChatStyle.calling")

    async def play(self, episode: Episode) -> Trajectory:
        """One whole episode; a subclass may live it differently."""
        with episode.stage("env"):
            env = await self._within_step("open", self._envs.open())
        try:
            if env.deterministic:
                episode.replay_history()
            async with contextlib.AsyncExitStack() as opened:
                tools: _Tools | None = None
                if self._tools is not None:
                    of_env = EnvTools(env, self._tools.of_env, timeout_s=self._step_timeout_s)
                    with episode.stage("tools"):
                        box = await opened.enter_async_context(
                            self._tools.of_episode(of_env, uses=episode.tool_uses)
                        )
                    tools = _Tools(box, of_env)
                return await self._play_in(env, episode, tools)
        finally:
            env.close()

    async def _play_in(self, env: AsyncEnv, episode: Episode, tools: "_Tools | None") -> Trajectory:
        with episode.stage("env"):
            seen = [await self._within_step("reset", env.reset(episode.task))]
        episode.observe(seen[0])
        conversation = TokenSequence([])
        turns: list[SampledSequence] = []
        states, rewards = [seen[0].text], list[float]()  # before each response, and after it
        prompt: Sequence[int] | None = await self._first_prompt(seen[0])
        while prompt is not None:
            conversation.add_prompt(prompt)
            completion = await self._generate(episode, conversation)
            if self._a_sample_a_turn:
                turn = conversation.going_on()
                turn.add_sampled(completion, turn=episode.turns - 1)
                turns.append(turn.snapshot())
            conversation.add_sampled(completion)
            said = self._said(prompt, completion.token_ids, calls=tools is not None)
            may_go_on = episode.turns != self._max_turns
            room = self._max_sequence_tokens - len(conversation.token_ids)
            prompt = None
            if tools is not None and (said.calls or said.wrong):
                if may_go_on or tools.of_env.tools:
                    text, prompt = await self._results(
                        episode, tools.box, said, completion.token_ids, room
                    )
                    states.append(text)
                steps = tools.of_env.take_steps()
                for step in steps:
                    episode.observe(step)
                seen += steps
                rewards.append(sum(step.reward for step in steps))
                if seen[-1].done or not may_go_on:
                    prompt = None
                continue
            with episode.stage("env"):
                seen.append(await self._within_step("step", env.step(said.text)))
            episode.observe(seen[-1])
            rewards.append(seen[-1].reward)
            if not seen[-1].done and may_go_on:
                prompt = await self._next_prompt(seen[-1], completion.token_ids, room)
            states.append(seen[-1].text)
        with episode.stage("reward"):
            reward = await self._reward_of(seen)
        return Trajectory(
            sequences=turns or [conversation.snapshot()],
            reward=reward,
            turns=episode.turns,
            success=bool(seen[-1].info.get("success", reward > 0)),
            turn_rewards=self._turn_rewards(rewards, reward),
            turn_states=states[: episode.turns],
        )

    def _said(self, prompt: Sequence[int], sampled: Sequence[int], *, calls: bool) -> Said:
        """What was said; without `calls` it is all for the environment."""
        if calls:
            assert isinstance(self._style, CallingStyle), "as the constructor has checked"
            return self._style.read(prompt, sampled)
        return Said(text=self._style.action(sampled))

    async def _results(
        self, episode: Episode, toolbox: Toolbox, said: Said, sampled: Sequence[int], room: int
    ) -> tuple[str, list[int] | None]:
        """What tools answered, and its tokens; None if they leave no room to answer."""
        if said.wrong:
            told = Observation(text=f"No tool was called: {said.wrong}.")
            return told.text, await self._next_prompt(told, sampled, room)
        with episode.stage("tools"):
            results = await toolbox.answer(said.calls)
        told = Observation(text="\n".join(results))
        if room <= 1:
            return told.text, None
        assert isinstance(self._style, CallingStyle), "as the constructor has checked"
        try:
            prompt = await self._tokens(told, self._style.results, said.calls, results, sampled)
        except ValueError as error:
            raise AgentFailure(f"no results of {len(said.calls)} calls: {error}") from error
        return told.text, prompt if prompt is not None and len(prompt) < room else None

    async def _first_prompt(self, observation: Observation) -> list[int]:
        limit = self._max_sequence_tokens
        prompt = await self._tokens(observation, self._style.first, observation)
        if prompt is None:
            raise EnvFailure(
                f"reset answered {_chars(observation)} characters, more than the "
                f"{longest_text(limit)} that are tokenised at max_sequence_tokens={limit}: "
                f"{shown(observation.text)}"
            )
        if len(prompt) >= limit:
            raise AgentFailure(
                f"the first prompt has {len(prompt)} tokens, which leaves no room to answer in "
                f"max_sequence_tokens={limit}"
            )
        return prompt

    async def _next_prompt(
        self, observation: Observation, sampled: Sequence[int], room: int
    ) -> list[int] | None:
        """None if it leaves no room to answer: then the episode ends before it."""
        if room <= 1:
            return None
        prompt = await self._tokens(observation, self._style.next, observation, sampled)
        return prompt if prompt is not None and len(prompt) < room else None

    async def _tokens(
        self, observation: Observation, tokenise: Callable[..., list[int]], *args: Any
    ) -> list[int] | None:
        """None for what is so long that it is not tokenised; what takes long goes to a thread."""
        chars = _chars(observation)
        if chars > longest_text(self._max_sequence_tokens):
            return None
        if chars > _CHARS_AT_ONCE:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(_LONG_TEXTS, tokenise, *args)
        return tokenise(*args)

    async def _generate(self, episode: Episode, conversation: TokenSequence) -> Completion:
        room = self._max_sequence_tokens - len(conversation.token_ids)
        sampling = self._sampling
        if room < sampling.max_tokens:
            sampling = replace(sampling, max_tokens=room)
        if self._experts:
            sampling = replace(sampling, experts_from=conversation.experts_from)
        try:
            return await episode.generate(conversation.token_ids, sampling)
        except ValueError as error:
            raise AgentFailure(f"no worker takes a request of the episode: {error}") from error

    async def _within_step(self, what: str, awaitable: Awaitable[_T]) -> _T:
        try:
            with Deadline(self._step_timeout_s):
                return await awaitable
        except TimeoutError as error:
            raise EnvFailure(
                f"{what} took longer than step_timeout_s={self._step_timeout_s:g}"
            ) from error

    def _turn_rewards(self, rewards: Sequence[float], reward: float) -> list[float]:
        """What followed each turn; a reward computed at the end followed the last one."""
        if self._reward is None:
            return list(rewards)
        return [0.0] * (len(rewards) - 1) + [reward]

    async def _reward_of(self, seen: Sequence[Observation]) -> float:
        if self._reward is None:
            return outcome(sum(observation.reward for observation in seen), "the environment")[0]
        try:
            async with asyncio.timeout(self._reward_timeout_s):
                with failing_as(RewardFailure, "the reward"):
                    answer = await self._reward(seen)
        except TimeoutError as error:
            raise RewardFailure(
                f"the reward took longer than reward_timeout_s={self._reward_timeout_s:g}"
            ) from error
        return outcome(answer, "the reward")[0]


@dataclass(frozen=True, slots=True)
class _Tools:
    """What one episode can call, and what of it is its environment's."""

    box: Toolbox
    of_env: EnvTools


def _chars(observation: Observation) -> int:
    """Of what prompt styles show."""
    info = observation.info
    shown_too = [info.get("goal", ""), *info.get("admissible_commands", ())]
    return len(observation.text) + sum(map(len, shown_too))
