"""Episodes of an agent that we can't change: it gets a base URL, and answers with its reward.

    ExternalAgent ──(base URL, key, task)──→ your agent ──→ reward
          │                                      ⇅ any OpenAI client
          └── sequences ←── DoorSession ←── Door: /v1/chat/completions, …

What it sampled is what the door recorded, under the same α, deadlines and ledger as any other.
Where several play an episode each has a base URL and a key, by which it is known.
"""

import asyncio
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, Protocol

from flash.answers import failing_as, number, shown
from flash.errors import AgentFailure, FlashError, RewardFailure, first_error
from flash.reward.outcome import outcome as stated_outcome
from flash.roles import Elsewhere, Role
from flash.rollout.episode import Episode
from flash.types import Completion, Generate, SampledSequence, SamplingParams, Task, Trajectory

from .actor import Actor, RewardStage

_ALONE = ""  # the role of one who plays an episode alone


class Act(Protocol):
    """One episode of a black-box agent.

    Returns its reward, or a mapping with `reward` and, if it is not just whether the reward is
    above 0, `success`. It runs in the event loop, so it must not block: what blocks is a command.

    Where several play, it takes `roles` in place of `base_url` and `api_key`: both of each role, by
    its name. What its answer has as `rewards` are those of roles that have another than `reward`;
    those of roles that are not trained are overlooked.
    """

    async def __call__(self, *, task: Task, **access: Any) -> Any: ...


class Session(Protocol):
    """An episode's place at the door."""

    base_url: str
    api_key: str

    def sequences(self) -> list[SampledSequence]: ...

    def close(self) -> None: ...


class Door(Protocol):
    """Where agents' calls come in: `flash.door.Door`."""

    def open(
        self,
        generate: Generate,
        *,
        max_tokens: int,
        temperature: float | None,
        max_sequence_tokens: int,
        role: str = "",
        turns: Iterator[int] | None = None,
    ) -> Session: ...

    def open_elsewhere(self, to: Elsewhere) -> Session: ...


class ExternalAgent(Actor):
    """Plays episodes with somebody else's agent.

    Args:
        door: answers the agent's calls with the policy, and keeps the tokens.
        act: the agent; whatever it raises fails the episode (agent).
        max_tokens: of one response, where the agent asks for more or for no number.
        max_sequence_tokens: of a conversation; the door refuses what would grow past it.
        options: are put under the task's own options.
        roles: by name, of those who play an episode together, if several do.
        experts: completions tell which experts tokens were routed to.
        episode_timeout_s: past it the agent is cancelled and the episode fails (deadline).
        reward_stage: another reward than the agent's own: see `flash/reward/`.
    """

    def __init__(
        self,
        *,
        door: Door,
        act: Act,
        max_tokens: int,
        max_sequence_tokens: int = 32_768,
        temperature: float = 1.0,
        options: Mapping[str, Any] | None = None,
        roles: Mapping[str, Role] | None = None,
        experts: bool = False,
        episode_timeout_s: float = 1800.0,
        reward_stage: RewardStage | None = None,
    ) -> None:
        super().__init__(
            episode_timeout_s=episode_timeout_s,
            reward_stage=partial(self._shared, reward_stage) if roles else reward_stage,
        )
        self._door = door
        self._act = act
        self._max_tokens = max_tokens
        self._max_sequence_tokens = max_sequence_tokens
        self._temperature = temperature
        self._options = dict(options or {})
        self._roles = dict(roles or {_ALONE: Role()})
        self._experts = experts

    async def play(self, episode: Episode) -> Trajectory:
        # Bound: a cause or two; the first one ends the episode.
        causes: asyncio.Queue[FlashError] = asyncio.Queue()
        sessions: dict[str, Session] = {}
        turns = itertools.count()
        try:
            for name, role in self._roles.items():
                sessions[name] = self._open(name, role, episode, turns, causes)
            with episode.stage("agent"):
                answer = await self._answer(sessions, episode.task, causes)
            sequences = [each for session in sessions.values() for each in session.sequences()]
        finally:
            for session in sessions.values():
                session.close()
        if not sequences:
            raise AgentFailure(
                "the agent never called the model: it must send its requests to the base URL that "
                "it is given"
            )
        reward, success = outcome(answer)
        return Trajectory(
            sequences=sequences,
            reward=reward,
            turns=episode.turns,
            success=success,
            role_rewards=self._told_rewards(answer),
        )

    def _open(
        self,
        name: str,
        role: Role,
        episode: Episode,
        turns: Iterator[int],
        causes: "asyncio.Queue[FlashError]",
    ) -> Session:
        if role.elsewhere is not None:
            return self._door.open_elsewhere(role.elsewhere)
        ask = role.generate or episode.generate

        async def generate(token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
            if self._experts and role.learns:
                sampling = replace(sampling, experts_from=0)
            try:
                return await ask(token_ids, sampling)
            except FlashError as error:
                # The agent would only see that a request failed, and be blamed for giving up.
                causes.put_nowait(error)
                raise

        return self._door.open(
            generate,
            max_tokens=self._max_tokens,
            temperature=self._temperature if role.learns else None,
            max_sequence_tokens=self._max_sequence_tokens,
            role=name,
            turns=turns,
        )

    async def _answer(
        self, sessions: Mapping[str, Session], task: Task, causes: "asyncio.Queue[FlashError]"
    ) -> Any:
        """What the agent answers, unless the engine fails it first."""
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(_raise_first(causes), name="watch generation")
                answer = await self._run(sessions, task)
                watch.cancel()
        return answer

    async def _run(self, sessions: Mapping[str, Session], task: Task) -> Any:
        task = replace(task, options={**self._options, **task.options})
        access = {
            name: {"base_url": session.base_url, "api_key": session.api_key}
            for name, session in sessions.items()
        }
        given: Mapping[str, Any] = access.get(_ALONE, {"roles": access})
        with failing_as(AgentFailure, "the agent"):
            return await self._act(task=task, **given)

    def _told_rewards(self, answer: Any) -> dict[str, float]:
        """Those of single roles who learn. RewardFailure for one that is none, or of nobody."""
        told = answer.get("rewards") if isinstance(answer, Mapping) else None
        if told is None:
            return {}
        roles = {name: role for name, role in self._roles.items() if name != _ALONE}
        of_roles = told if isinstance(told, Mapping) else {}
        rewards = {name: number(reward) for name, reward in of_roles.items() if name in roles}
        if told is not of_roles or len(rewards) < len(of_roles) or None in rewards.values():
            raise RewardFailure(
                f"the agent answered 'rewards'={shown(told)}: it must be a finite number for each "
                f"of some roles ({', '.join(roles) or 'agent.roles has none'})"
            )
        return {
            name: reward
            for name, reward in rewards.items()
            if reward is not None and roles[name].learns
        }

    async def _shared(
        self, stage: RewardStage | None, episode: Episode, trajectory: Trajectory
    ) -> Trajectory:
        """With a reward for each role: its own, or its share of the episode's."""
        if stage is not None:
            trajectory = await stage(episode, trajectory)
        shares = {
            name: role.share * trajectory.reward
            for name, role in self._roles.items()
            if role.learns
        }
        return replace(trajectory, role_rewards={**shares, **trajectory.role_rewards})


async def _raise_first(causes: "asyncio.Queue[FlashError]") -> NoReturn:
    raise await causes.get()


def outcome(answer: object) -> tuple[float, bool]:
    """Reward and success of an agent's answer. RewardFailure if it holds no reward."""
    reward, success = stated_outcome(answer, "the agent")
    return reward, reward > 0 if success is None else success
