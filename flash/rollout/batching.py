"""From complete groups to the batch that the trainer gets: samples, advantages, numbers."""

from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flash.rollout.episode import Episode
from flash.rollout.groups import Group
from flash.trainer.advantages import Advantages, OfEpisodes, PerGroup
from flash.types import Sample, SampledSequence, ToolUse, Trajectory, by_role

_STAGES = ("generate", "env", "tools", "agent", "reward")
_SAMPLES_AT_ONCE = 128  # of a hand-over; each takes 30 µs or so, with all who are told of it


def parts_of(groups: Iterable[Group]) -> Iterator[list[Group]]:
    """The groups in parts that are few enough not to hold the event loop for long."""
    part: list[Group] = []
    samples = 0
    for group in groups:
        of_group = sum(len(trajectory.sequences) for trajectory in trajectories(group))
        if part and samples + of_group > _SAMPLES_AT_ONCE:
            yield part
            part, samples = [], 0
        part.append(group)
        samples += of_group
    if part:
        yield part


def samples_of(
    groups: Sequence[Group], *, version: int, alpha: float, advantages: Advantages
) -> Generator[None, None, list[Sample]]:
    """What is to be trained at `version`; checks the age of every token.

    Gives way between parts of the groups. Advantages for which a group is compared with others
    are computed without a pause.
    """
    samples: list[Sample] = []
    of_batch = None if isinstance(advantages, PerGroup) else _computed(groups, advantages)
    for part in parts_of(groups):
        of_part = of_batch or _computed(part, advantages)
        for group in part:
            samples += _samples(group, of_part[group])
        ages = Ages(version)
        ages.add(part)
        assert ages.oldest <= alpha, f"a token is {ages.oldest} versions old"
        yield
    return samples


def compared(
    groups: Sequence[Sequence[Trajectory]], advantages: Advantages
) -> list[dict[str, OfEpisodes]]:
    """Of each group and role: who has the same role is compared with each other."""
    played = [by_role(group) for group in groups]
    computed = iter(advantages([episodes for roles in played for episodes in roles.values()]))
    return [{role: next(computed) for role in roles} for roles in played]


def _computed(
    groups: Sequence[Group], advantages: Advantages
) -> dict[Group, dict[str, OfEpisodes]]:
    of_groups = compared([trajectories(group) for group in groups], advantages)
    return dict(zip(groups, of_groups, strict=True))


def _samples(group: Group, advantages: Mapping[str, OfEpisodes]) -> Iterator[Sample]:
    for number, episode in enumerate(group.members.values()):
        trajectory = _trajectory(episode)
        for sequence in trajectory.sequences:
            role = sequence.role
            yield Sample.extending(
                sequence,
                advantage=of_tokens(advantages[role][number], sequence),
                reward=trajectory.role_rewards.get(role, trajectory.reward),
                turn_rewards=trajectory.turn_rewards,
                group=group.id,
                episode=episode.id,
            )


class Numbers:
    """What is known of a batch at hand-over; its groups are added part by part.

    Ages are per token, in versions. The same of each task set ends in its name; `share/*` is of the
    sampled tokens.
    """

    def __init__(self, version: int) -> None:
        self._version = version
        self._ages: dict[str, Ages] = {}  # by task set
        # By task set, of each episode: reward, success, turns, sampled tokens.
        self._ended: dict[str, list[tuple[float, bool, int, int]]] = defaultdict(list)
        self._seconds: dict[str, list[float]] = {name: [] for name in _STAGES}
        self._tool_uses: dict[str, ToolUse] = {}

    def add(self, groups: Iterable[Group]) -> None:
        for group in groups:
            self._ages_of(group).add([group])
            of_set = self._ended[group.task.task_set]
            for member in group.members.values():
                trajectory = _trajectory(member)
                tokens = sum(member.tokens_of.values())
                of_set.append((trajectory.reward, trajectory.success, trajectory.turns, tokens))
                for stage, seconds in self._seconds.items():
                    seconds.append(member.seconds.get(stage, 0.0))
                for tool, use in member.tool_uses.items():
                    self._tool_uses.setdefault(tool, ToolUse()).add(use)

    def add_again(self, groups: Iterable[Group]) -> None:
        """Groups that were trained before, which count for the ages only."""
        for group in groups:
            self._ages_of(group).add([group])

    def _ages_of(self, group: Group) -> "Ages":
        name = group.task.task_set
        if name not in self._ages:
            self._ages[name] = Ages(self._version)
        return self._ages[name]

    def metrics(self) -> dict[str, Any]:
        ended = [of_one for of_set in self._ended.values() for of_one in of_set]
        tokens = max(1, sum(of_one[-1] for of_one in ended))
        metrics = _means(ended)
        ages = Ages(self._version)
        for name, of_ages in self._ages.items():
            ages.join(of_ages)
            if name:
                metrics[f"staleness/mean/{name}"] = of_ages.mean
                metrics[f"staleness/max/{name}"] = of_ages.oldest
        for name, of_set in self._ended.items():
            if name:
                metrics |= {f"{metric}/{name}": value for metric, value in _means(of_set).items()}
                metrics[f"share/{name}"] = sum(of_one[-1] for of_one in of_set) / tokens
        for tool, use in self._tool_uses.items():
            metrics |= {
                f"tools/calls/{tool}": use.calls,
                f"tools/errors/{tool}": use.errors,
                f"tools/late/{tool}": use.late,
                f"tools/seconds/{tool}": use.seconds / use.calls,
            }
        return metrics | {
            "staleness/mean": ages.mean,
            "staleness/max": ages.oldest,
            "staleness/histogram": ages.histogram(),
            **{f"time/{stage}_s": float(np.mean(s)) for stage, s in self._seconds.items()},
        }


def _means(ended: Sequence[tuple[float, bool, int, int]]) -> dict[str, float]:
    rewards, successes, turns, _ = zip(*ended, strict=True)
    return {
        "reward/mean": float(np.mean(rewards)),
        "success_rate": float(np.mean(successes)),
        "turns/mean": float(np.mean(turns)),
    }


class Ages:
    """How old the sampled tokens of complete groups are at a version; all 0 without any."""

    def __init__(self, version: int) -> None:
        self._version = version
        self._tokens: Counter[int] = Counter()

    def add(self, groups: Iterable[Group]) -> None:
        for group in groups:
            for member in group.members.values():
                for sampled_by, count in member.tokens_of.items():
                    self._tokens[self._version - sampled_by] += count

    def join(self, others: "Ages") -> None:
        """With those of other groups, at the same version."""
        self._tokens += others._tokens

    @property
    def mean(self) -> float:
        ages = sum(age * count for age, count in self._tokens.items())
        return ages / self._tokens.total() if self._tokens else 0.0

    @property
    def oldest(self) -> int:
        return max(self._tokens, default=0)

    def histogram(self) -> list[int]:
        """How many tokens are of each age, from 0 on."""
        assert min(self._tokens, default=0) >= 0, "a token of a version that is not trained yet"
        return [self._tokens[age] for age in range(self.oldest + 1)] if self._tokens else []


def trajectories(group: Group) -> list[Trajectory]:
    """Of a complete group."""
    return [_trajectory(member) for member in group.members.values()]


def _trajectory(episode: Episode) -> Trajectory:
    assert episode.trajectory is not None
    return episode.trajectory


def of_tokens(
    advantage: NDArray[np.float64] | float, sequence: SampledSequence
) -> float | NDArray[np.float32]:
    """One number for the sequence; or, of one for each turn, that of each token's turn, [S]."""
    if np.ndim(advantage) == 0:
        return float(advantage)
    of_turns = np.append(advantage, 0.0).astype(np.float32)  # -1, the last, is for other tokens
    return np.asarray(of_turns[sequence.turns])
