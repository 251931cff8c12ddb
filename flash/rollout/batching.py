"""From complete groups to the batch that the trainer gets: samples, advantages, numbers."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flash.rollout.episode import Episode
from flash.rollout.groups import Group
from flash.trainer.advantages import Advantages
from flash.types import Sample, SampledSequence, Trajectory


def samples_of(
    groups: Sequence[Group], *, version: int, alpha: float, advantages: Advantages
) -> list[Sample]:
    """What is to be trained at `version`; checks the age of every token."""
    samples: list[Sample] = []
    computed = advantages([trajectories(group) for group in groups])
    for group, of_group in zip(groups, computed, strict=True):
        for member, of_episode in zip(group.members.values(), of_group, strict=True):
            trajectory = _trajectory(member)
            samples += [
                Sample.extending(
                    sequence,
                    advantage=of_tokens(of_episode, sequence),
                    reward=trajectory.reward,
                    turn_rewards=trajectory.turn_rewards,
                    group=group.id,
                    episode=member.id,
                )
                for sequence in trajectory.sequences
            ]
    ages = token_ages(samples, version)
    oldest = ages.max() if ages.size else 0
    assert oldest <= alpha, f"a token is {oldest} versions old"
    return samples


def metrics_of(
    groups: Sequence[Group], again: Sequence[Group] = (), *, version: int
) -> dict[str, Any]:
    """What is known of a batch at hand-over; ages are per token, in versions.

    Those groups that were trained before count for the ages only.
    """
    episodes = [member for group in groups for member in group.members.values()]
    ended = [_trajectory(episode) for episode in episodes]
    trained = [*ended, *(t for group in again for t in trajectories(group))]
    ages = token_ages([sequence for t in trained for sequence in t.sequences], version)

    def mean_seconds(stage: str) -> float:
        return float(np.mean([episode.seconds.get(stage, 0.0) for episode in episodes]))

    return {
        "reward/mean": float(np.mean([t.reward for t in ended])),
        "success_rate": float(np.mean([t.success for t in ended])),
        "turns/mean": float(np.mean([t.turns for t in ended])),
        "staleness/mean": float(ages.mean()) if ages.size else 0.0,
        "staleness/max": int(ages.max()) if ages.size else 0,
        "staleness/histogram": np.bincount(ages).tolist() if ages.size else [],
        "time/generate_s": mean_seconds("generate"),
        "time/env_s": mean_seconds("env"),
        "time/agent_s": mean_seconds("agent"),
        "time/reward_s": mean_seconds("reward"),
    }


def metrics_of_sets(groups: Sequence[Group]) -> dict[str, Any]:
    """The same of each task set, by its name; `share/*` is of the sampled tokens."""
    by_set: dict[str, list[Trajectory]] = defaultdict(list)
    for group in groups:
        by_set[group.task.task_set] += trajectories(group)
    if not any(by_set):
        return {}
    tokens = {
        name: sum(int((s.loss_mask > 0).sum()) for t in ended for s in t.sequences)
        for name, ended in by_set.items()
    }
    metrics: dict[str, Any] = {}
    for name, ended in by_set.items():
        metrics |= {
            f"reward/mean/{name}": float(np.mean([t.reward for t in ended])),
            f"success_rate/{name}": float(np.mean([t.success for t in ended])),
            f"turns/mean/{name}": float(np.mean([t.turns for t in ended])),
            f"share/{name}": tokens[name] / max(1, sum(tokens.values())),
        }
    return metrics


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


def token_ages(sequences: Sequence[SampledSequence], version: int) -> NDArray[np.int64]:
    """Of the sampled tokens, at that version."""
    versions = [sequence.sampled_versions() for sequence in sequences]
    return version - np.concatenate(versions) if versions else np.zeros(0, np.int64)
