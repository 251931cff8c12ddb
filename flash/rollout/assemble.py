"""From complete groups to the batch that the trainer gets: samples, advantages, numbers."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flash.rollout.episode import Episode
from flash.rollout.groups import Group
from flash.trainer.advantages import Advantages
from flash.types import Batch, Sample, Trajectory


def batch_of(
    groups: Sequence[Group], *, version: int, alpha: float, advantages: Advantages
) -> Batch:
    """The groups' samples, to be trained at `version`; checks the age of every token."""
    samples: list[Sample] = []
    episodes: list[Episode] = []
    computed = advantages([trajectories(group) for group in groups])
    for group, of_group in zip(groups, computed, strict=True):
        members = list(group.members.values())
        for member, of_episode in zip(members, of_group, strict=True):
            samples += [
                replace(
                    sample,
                    advantage=_of_tokens(of_episode, sample),
                    reward=trajectory(member).reward,
                    turn_rewards=trajectory(member).turn_rewards,
                    group=group.id,
                    episode=member.id,
                )
                for sample in trajectory(member).samples
            ]
        episodes += members
    ages = version - np.concatenate([s.sampled_versions() for s in samples])
    assert ages.size == 0 or ages.max() <= alpha, f"a token is {ages.max()} versions old"
    return Batch(samples=samples, version=version, metrics=_metrics(episodes, ages))


def trajectories(group: Group) -> list[Trajectory]:
    """Of a complete group."""
    return [trajectory(member) for member in group.members.values()]


def trajectory(episode: Episode) -> Trajectory:
    assert episode.trajectory is not None
    return episode.trajectory


def _of_tokens(
    advantage: NDArray[np.float64] | float, sample: Sample
) -> float | NDArray[np.float32]:
    """One number for the sample; or, of one for each turn, that of each token's turn, [T]."""
    if np.ndim(advantage) == 0:
        return float(advantage)
    assert sample.turns is not None
    of_turns = np.append(advantage, 0.0).astype(np.float32)  # -1, the last, is for other tokens
    return np.asarray(of_turns[sample.turns])


def _metrics(episodes: Sequence[Episode], ages: NDArray[np.int64]) -> dict[str, Any]:
    """What is known of a batch at hand-over; ages are per token, in versions."""

    def mean_seconds(stage: str) -> float:
        return float(np.mean([episode.seconds.get(stage, 0.0) for episode in episodes]))

    ended = [trajectory(episode) for episode in episodes]
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
