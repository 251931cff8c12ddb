"""What can go wrong, named after the boundary it crossed.

    FlashError
    ├── EpisodeFailure        ends one episode, is counted, and the task is started again
    │   ├── EnvFailure        the environment or its host
    │   ├── AgentFailure      the agent's own code
    │   ├── RewardFailure     the reward stage
    │   └── DeadlineFailure   an episode or a stage of it took too long
    ├── HistoryDiverged       an episode that should go on where a crash cut it off starts over
    ├── InferenceFailure      no worker could answer
    ├── TrainerFailure        a trainer rank died or raised
    ├── PublishFailure        new weights did not become the policy, or not exactly
    ├── RolloutFailure        the rollout loop can't go on: too many failures, or no tasks
    │   └── RolloutStall      nothing moves any more; names one cause
    ├── ClusterFailure        the cluster lost what the run can't do without
    ├── LogFailure            what happens can't be written down, so it must not count
    └── ProcessFailure        a child process of ours died or raised
        └── ProcessEnded      it died, or was ended
            └── NodeLost      with its node: it is nothing that it did

A user's mistake is a `ValueError` with the field, the value and the remedy.
"""

import contextlib
from collections.abc import Iterator


class FlashError(Exception):
    """Base of every error that crosses a boundary of the engine."""

    exit_code = 1  # of a command that it ends


class EpisodeFailure(FlashError):
    """Ends one episode; the run goes on."""

    kind = "episode"


class EnvFailure(EpisodeFailure):
    """The environment raised, hung, or its host died."""

    kind = "env"


class AgentFailure(EpisodeFailure):
    """The agent's code raised something that it did not foresee."""

    kind = "agent"


class RewardFailure(EpisodeFailure):
    """The reward could not be computed; it never becomes a reward of 0."""

    kind = "reward"


class DeadlineFailure(EpisodeFailure):
    """An episode, or one of its stages, passed its deadline."""

    kind = "deadline"


class HistoryDiverged(FlashError):
    """What happens in an episode is not what its history says; the message tells the difference.

    Only an agent that calls `Episode.replay_history` meets it: it calls `Episode.begin_anew`, and
    plays again.
    """


class InferenceFailure(FlashError):
    """The worker pool can't answer any more, or answered what can't be true."""


class TrainerFailure(FlashError):
    """A trainer rank died or raised; carries its traceback."""


class PublishFailure(FlashError):
    """Weights could not be published, or a worker's logprobs differ from the trainer's."""


class ClusterFailure(FlashError):
    """A cluster does not answer, or none of a run's explorers can play there."""


class LogFailure(FlashError):
    """The durable log can't be written; what it holds is whole."""


class RolloutFailure(FlashError):
    """The rollout loop can't go on; the message names the episodes and stages at fault."""


class RolloutStall(RolloutFailure):
    """The run made no progress for too long. `cause` is its name, the message the whole report."""

    exit_code = 3

    def __init__(self, cause: str, report: str) -> None:
        super().__init__(report)
        self.cause = cause


class ProcessFailure(FlashError):
    """A child process died or raised; the message holds its last output or traceback."""


class ProcessEnded(ProcessFailure):
    """A process on another node is no more."""


class NodeLost(ProcessEnded):
    """The node of a process is lost, can't be reached, or is none: it is nothing that it did."""


def one_line(error: BaseException) -> str:
    """An error's type and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def in_a_line(failure: BaseException) -> str:
    """What failed and why: the first line of what is told, and what is said last."""
    lines = (str(failure).strip() or repr(failure)).splitlines()
    return " ".join(lines[:1] + lines[1:][-1:])


@contextlib.contextmanager
def first_error() -> Iterator[None]:
    """Of the errors that a TaskGroup inside raises as a group, the first, with its own cause."""
    try:
        yield
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        raise first from first.__cause__
