"""The records that pass between the parts, and the seams they pass through.

Arrays are NumPy, one-dimensional over the S tokens of one sequence: [S].
"""

from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from flash.choices import UpdateMode as UpdateMode  # noqa: PLC0414  (it is a name of this module)

Outcome = Literal["trained", "dropped", "failed", "cancelled"]
FinishReason = Literal["stop", "length", "abort"]
UNKNOWN_EXPERT = -1  # where it is not known which expert a token had
Experts = NDArray[np.int16]
"""What tokens were routed to, [tokens, layers of the model times experts of a token in each].

One layer after the other, also those without experts, whatever these have; UNKNOWN_EXPERT where it
is not known.
"""


# ── inference ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one response is sampled.

    `stop`: texts after which nothing more is needed; a worker may still say more, so who asks looks
    for them too. `constraint`: what the response keeps to, a structural tag of XGrammar's as JSON;
    only for workers that say that they can (`Worker.constrains`). Its logprobs are those of the
    tokens that the constraint leaves.

    `experts_from`: the completion tells the experts of the tokens from that one on, counted with
    the prompt's.
    """

    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    constraint: str | None = None
    experts_from: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One response to sample after `token_ids`.

    session: names requests that share prefixes; the hub sends them to one worker if it can.
    pin: names requests that must all go to one worker, even if they have to wait for it. The first
        of them goes to whichever is best; while that worker takes no requests at all (it failed,
        or gets new weights) the next one chooses anew.
    """

    token_ids: Sequence[int]
    sampling: SamplingParams
    session: str = ""
    pin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the engine sampled at `temperature`.

    Of each token its logprob, natural log, of the distribution that it was sampled from, and the
    version of the policy that sampled it; the three lists have one length.

    `experts`, where they were asked for: of each token from `SamplingParams.experts_from` to the
    last but one those that it was routed to: of the last one nothing was computed yet.
    """

    token_ids: list[int]
    logprobs: list[float]
    versions: list[int]
    temperature: float
    finish_reason: FinishReason
    worker: str = ""
    experts: Experts | None = None

    def cut(self, tokens: int) -> "Completion":
        """Its first tokens alone."""
        experts, less = self.experts, len(self.token_ids) - tokens
        return replace(
            self,
            token_ids=self.token_ids[:tokens],
            logprobs=self.logprobs[:tokens],
            versions=self.versions[:tokens],
            experts=None if experts is None else experts[: max(0, len(experts) - less)],
        )

    @property
    def only_version(self) -> int | None:
        """The version that sampled all of it; None if several did, or there is nothing."""
        if not self.versions or self.versions.count(self.versions[0]) < len(self.versions):
            return None
        return self.versions[0]


Generate = Callable[[Sequence[int], SamplingParams], Awaitable[Completion]]
"""One response after these tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What the trainer itself says of sequences.

    logprobs: of the tokens of each sequence after its first, natural log.
    largest_logit: in size, of those that they come from; what rounding does to logits grows with
        it. 0 if it is not known.
    """

    logprobs: Sequence[Sequence[float]]
    largest_logit: float = 0.0


Score = Callable[[Sequence[Sequence[int]]], Awaitable[Scores | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Weights of one policy version: a directory of safetensors in Hugging Face layout.

    With `adapters` it holds adapters in PEFT's format, of the model that workers started with.

    `score` gives the trainer's own logprobs of sequences under these weights, or None if the
    trainer can't say any more; with it, every publish is probed.
    Without it the probe can't be made and the gap is not known.

    `share` has the trainer keep them in the memory of its devices too while a block runs, for
    workers on the same: it gives the folder that tells of that memory, or None if it has none.
    `shared` is that folder, in such a block.

    `changed` is the share of values that are not what they were in the weights before, None if
    that is not known. Where it is small the directory may have a delta (flash/worker/delta.py).
    """

    version: int
    path: Path
    score: Score | None = None
    changed: float | None = None
    share: Callable[[], AbstractAsyncContextManager[Path | None]] | None = None
    shared: Path | None = None
    adapters: bool = False


# ── environments ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Task:
    """What an environment is reset to; the episodes of a group share it.

    `seed` goes to `reset(seed=…)`, `options` to `reset(options=…)`. `task_set` names the set that
    it is of, where a run has several.
    """

    seed: int
    options: Mapping[str, Any] = field(default_factory=dict)
    task_set: str = ""

    def __str__(self) -> str:
        return f"seed {self.seed}" + (f" of {self.task_set}" if self.task_set else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the agent sees after a reset or a step.

    `info` is the environment's: `goal` (str), `admissible_commands` (list of str) and `success`
    (bool, at the end) are understood by the prompt styles and the metrics. Of an environment's
    other entries those that are plain data are kept.
    """

    text: str
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> bool:
        return self.terminated or self.truncated


class AsyncEnv(Protocol):
    """One environment in the hands of one agent. Raises EnvFailure, nothing else."""

    @property
    def deterministic(self) -> bool:
        """Whether it says that the same task and actions always give the same observations."""
        ...

    async def reset(self, task: Task) -> Observation: ...

    async def step(self, action: str) -> Observation: ...

    def close(self) -> None:
        """Lets go of it, at once and whatever it is doing; raises nothing at all."""
        ...


@runtime_checkable
class ToolEnv(AsyncEnv, Protocol):
    """One that may have tools."""

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> str | Observation:
        """What that tool answers: a result, or what came of a step."""
        ...


@dataclass(slots=True)
class ToolUse:
    """Calls of one tool: how many, how many of them went wrong or took too long, and the seconds
    of all."""

    calls: int = 0
    errors: int = 0
    late: int = 0
    seconds: float = 0.0

    def add(self, other: "ToolUse") -> None:
        self.calls += other.calls
        self.errors += other.errors
        self.late += other.late
        self.seconds += other.seconds


class EnvSource(Protocol):
    """Opens environments for agents: in this process, or in environment hosts."""

    async def open(self) -> AsyncEnv: ...


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a demonstration: what was seen, and what the expert then did.

    With `imitate` false the action was done but is not to be learned (a random command that shows
    what "Nothing happens." means).
    """

    observation: Observation
    action: str
    imitate: bool = True


class Teachable(Protocol):
    """An environment that can teach a small policy from nothing.

    `vocabulary`: every word or phrase that observations and actions are made of; a phrase such as
    "drawer 3" becomes one token. `demonstrate`: one expert episode on the game of that task.
    """

    def vocabulary(self) -> list[str]: ...

    def demonstrate(self, task: Task) -> list[Turn]: ...


class PromptStyle(Protocol):
    """Turns observations into prompt tokens and sampled tokens into actions.

    The conversation only grows: each call returns the tokens to append, so sampled tokens are
    never tokenised again. Of a long observation `first` and `next` are called in a thread.
    """

    stop_token_ids: tuple[int, ...]

    def first(self, observation: Observation) -> list[int]:
        """Tokens of the prompt for the first action."""
        ...

    def next(self, observation: Observation, sampled: Sequence[int]) -> list[int]:
        """Tokens between the sampled action (which may lack its stop token) and the next one."""
        ...

    def action(self, sampled: Sequence[int]) -> str:
        """The command that the sampled tokens spell."""
        ...


# ── episodes ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledSequence:
    """Tokens that a policy read and sampled, in their order; every array is [S], but `experts`.

    Of the sampled ones `logprobs`, `versions` and `temperatures` are the engine's own
    (`Completion`), and `turns` says to which response of the episode a token belongs, counted from
    0. Elsewhere they are 0, -1, 1 and -1. `loss_mask` is 1 on sampled tokens, but for those that
    were sampled under a constraint (docs/decisions/0014), and 0 elsewhere.
    `flash.conversation.TokenSequence` keeps count of all that.

    `experts` are those that each token was routed to when it was read or sampled, S rows; None if
    no worker told any. `role` is who said it, of an episode that several play.

    Example, a prompt of two tokens and a response of two, sampled by version 3:

        SampledSequence(
            token_ids=np.array([5, 6, 7, 8]),
            loss_mask=np.array([0, 0, 1, 1], np.float32),
            logprobs=np.array([0, 0, -0.7, -0.1], np.float32),
            versions=np.array([-1, -1, 3, 3]),
            temperatures=np.ones(4, np.float32),
            turns=np.array([-1, -1, 0, 0]),
        )
    """

    token_ids: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    logprobs: NDArray[np.float32]
    versions: NDArray[np.int64]
    temperatures: NDArray[np.float32]
    turns: NDArray[np.int64]
    experts: Experts | None = None
    role: str = ""

    @classmethod
    def extending(cls, sequence: "SampledSequence", **more: Any) -> Self:
        """A record of this kind with the fields of `sequence`; those in `more` come first.

        Raises TypeError for a field that is in neither.
        """
        return cls(**{f.name: getattr(sequence, f.name) for f in fields(sequence)} | more)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    def runs(self, start: int = 0) -> list[tuple[bool, list[int]]]:
        """Whether they were sampled, and their token ids, of each run of tokens from `start` on."""
        sampled = (self.turns[start:] >= 0).tolist()
        pairs = zip(sampled, self.token_ids[start:].tolist(), strict=True)
        return [(of_run, [t for _, t in run]) for of_run, run in groupby(pairs, lambda p: p[0])]

    def sampled_versions(self) -> NDArray[np.int64]:
        """Versions of the sampled tokens only that are trained on, [sampled]."""
        return self.versions[self.loss_mask > 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """An episode that came to its end: what was sampled in it and what it was worth.

    Of each turn, where the agent knows it: the reward that followed it, and the state that it began
    in (any two that are equal are taken for the same). `role_rewards` are those of
    roles, of several that play an episode, that have another one than `reward`.
    """

    sequences: list[SampledSequence]
    reward: float
    turns: int
    success: bool = False
    turn_rewards: Sequence[float] = ()
    turn_states: Sequence[Hashable] = ()
    role_rewards: Mapping[str, float] = field(default_factory=dict)

    def of_role(self, role: str) -> "Trajectory":
        """What that one said in it, and what that was worth; there may be nothing that it said."""
        return replace(
            self,
            sequences=[sequence for sequence in self.sequences if sequence.role == role],
            reward=self.role_rewards.get(role, self.reward),
            role_rewards={},
        )


def by_role(group: Sequence[Trajectory]) -> dict[str, Sequence[Trajectory]]:
    """The episodes of a group as each role has them, by its name; of one player's, as they are."""
    roles = sorted({sequence.role for trajectory in group for sequence in trajectory.sequences})
    if roles in ([], [""]):
        return {"": group}
    return {role: [trajectory.of_role(role) for trajectory in group] for role in roles}


@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """An episode that came to its end, as a scorer sees it.

    `text` is all that the policy read and said, `responses` what it said, turn by turn; `reward`
    and `success` are what the environment, or the agent, thinks of it.

    Example of a reward function:

        def brief(transcript: Transcript) -> float:
            return transcript.reward - 0.01 * len(transcript.responses)
    """

    task: Task
    text: str
    responses: tuple[str, ...]
    reward: float
    success: bool


# ── training ─────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(SampledSequence):
    """A sequence to train on, with what it was worth.

    `advantage` is one number, or one for each token, [S]. `reward` is the episode's;
    `turn_rewards` are those that followed its turns, empty if they are not known. In supervised
    samples nothing is sampled, and `loss_mask` may hold any weight of at least 0.
    """

    advantage: float | NDArray[np.float32]
    reward: float
    turn_rewards: Sequence[float]
    group: int
    episode: int

    @classmethod
    def supervised(
        cls,
        token_ids: Sequence[int] | NDArray[np.integer[Any]],
        loss_mask: Sequence[float] | NDArray[np.float32],
        *,
        turns: Sequence[int] | None = None,
        episode: int,
    ) -> Self:
        """One that nobody sampled, of all its tokens; `episode` is what errors name it by."""
        tokens = len(token_ids)
        return cls(
            token_ids=np.array(token_ids, dtype=np.int64),
            loss_mask=np.array(loss_mask, dtype=np.float32),
            logprobs=np.zeros(tokens, dtype=np.float32),
            versions=np.full(tokens, -1, dtype=np.int64),
            temperatures=np.ones(tokens, dtype=np.float32),
            turns=np.full(tokens, -1) if turns is None else np.array(turns, dtype=np.int64),
            advantage=0.0,
            reward=0.0,
            turn_rewards=(),
            group=episode,
            episode=episode,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertSequence:
    """Tokens that others than the policy wrote, to be imitated; both arrays are [S].

    `loss_mask` is what a token counts in the loss, at least 0: 1 on the expert's own words, 0 on
    what it read. `source` is what errors and the log name the sequence by.
    """

    token_ids: NDArray[np.int64]
    loss_mask: NDArray[np.float32]
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShare:
    """What a batch imitates, and its `weight` μ in the loss, from 0 to below 1.

    loss = (1 - μ) · that of the policy's own samples + μ · -log π of the expert's tokens
    """

    sequences: Sequence[ExpertSequence]
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Whole groups, to be trained at policy version `version`.

    A batch may come in parts; then the last of them has the numbers of all, and the `expert`'s
    share. That one is no part of `samples`: it has no age, no reward and no advantage.
    """

    samples: list[Sample]
    version: int
    last: bool = True
    metrics: Mapping[str, Any] = field(default_factory=dict)
    expert: ExpertShare | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerState:
    """What the trainer is at.

    `doing` is the call, empty if there is none, `since` when it began, or the last one ended, in
    seconds of the event loop's clock, `dead` why the trainer is, empty if it lives, and `waits_for`
    what it must have and may come at any time, as a node of a cluster, empty if nothing.
    """

    doing: str = ""
    since: float = 0.0
    dead: str = ""
    waits_for: str = ""
