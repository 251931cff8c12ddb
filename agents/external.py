"""Episodes of an agent that we can't change: it gets a base URL, and answers with its reward.

    ExternalAgent ──(base URL, key, task)──→ your agent ──→ reward
          │                                      ⇅ any OpenAI client
          └── sequences ←── DoorSession ←── Door: /v1/chat/completions, …

What it sampled is what the door recorded, under the same α, deadlines and ledger as any other.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, Protocol

from flash.answers import failing_as
from flash.errors import AgentFailure, FlashError, first_error
from flash.reward.outcome import outcome as stated_outcome
from flash.rollout.episode import Episode
from flash.types import Completion, SampledSequence, SamplingParams, Task, Trajectory

from .actor import Actor, RewardStage

Generate = Callable[[Sequence[int], SamplingParams], Awaitable[Completion]]


class Act(Protocol):
    """One episode of a black-box agent.

    Returns its reward, or a mapping with `reward` and, if it is not just whether the reward is
    above 0, `success`. It runs in the event loop, so it must not block: what blocks is a command.
    """

    async def __call__(self, *, base_url: str, api_key: str, task: Task) -> Any: ...


class Session(Protocol):
    """An episode's place at the door."""

    base_url: str
    api_key: str

    def sequences(self) -> list[SampledSequence]: ...

    def close(self) -> None: ...


class Door(Protocol):
    """Where agents' calls come in: `flash.door.Door`."""

    def open(
        self, generate: Generate, *, max_tokens: int, temperature: float, max_sequence_tokens: int
    ) -> Session: ...


class ExternalAgent(Actor):
    """Plays episodes with somebody else's agent.

    Args:
        door: answers the agent's calls with the policy, and keeps the tokens.
        act: the agent; whatever it raises fails the episode (agent).
        max_tokens: of one response, where the agent asks for more or for no number.
        max_sequence_tokens: of a conversation; the door refuses what would grow past it.
        options: are put under the task's own options.
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
        experts: bool = False,
        episode_timeout_s: float = 1800.0,
        reward_stage: RewardStage | None = None,
    ) -> None:
        super().__init__(episode_timeout_s=episode_timeout_s, reward_stage=reward_stage)
        self._door = door
        self._act = act
        self._max_tokens = max_tokens
        self._max_sequence_tokens = max_sequence_tokens
        self._temperature = temperature
        self._options = dict(options or {})
        self._experts = experts

    async def play(self, episode: Episode) -> Trajectory:
        # Bound: a cause or two; the first one ends the episode.
        causes: asyncio.Queue[FlashError] = asyncio.Queue()

        async def generate(token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
            if self._experts:
                sampling = replace(sampling, experts_from=0)
            try:
                return await episode.generate(token_ids, sampling)
            except FlashError as error:
                # The agent would only see that a request failed, and be blamed for giving up.
                causes.put_nowait(error)
                raise

        session = self._door.open(
            generate,
            max_tokens=self._max_tokens,
            temperature=self._temperature,
            max_sequence_tokens=self._max_sequence_tokens,
        )
        try:
            with episode.stage("agent"):
                answer = await self._answer(session, episode.task, causes)
            sequences = session.sequences()
        finally:
            session.close()
        if not sequences:
            raise AgentFailure(
                "the agent never called the model: it must send its requests to the base URL that "
                "it is given"
            )
        reward, success = outcome(answer)
        return Trajectory(sequences=sequences, reward=reward, turns=episode.turns, success=success)

    async def _answer(
        self, session: Session, task: Task, causes: "asyncio.Queue[FlashError]"
    ) -> Any:
        """What the agent answers, unless the engine fails it first."""
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                watch = tasks.create_task(_raise_first(causes), name="watch generation")
                answer = await self._run(session, task)
                watch.cancel()
        return answer

    async def _run(self, session: Session, task: Task) -> Any:
        task = replace(task, options={**self._options, **task.options})
        with failing_as(AgentFailure, "the agent"):
            return await self._act(base_url=session.base_url, api_key=session.api_key, task=task)


async def _raise_first(causes: "asyncio.Queue[FlashError]") -> NoReturn:
    raise await causes.get()


def outcome(answer: object) -> tuple[float, bool]:
    """Reward and success of an agent's answer. RewardFailure if it holds no reward."""
    reward, success = stated_outcome(answer, "the agent")
    return reward, reward > 0 if success is None else success
