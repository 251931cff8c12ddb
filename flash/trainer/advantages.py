"""From the rewards of a batch's episodes to their advantages.

Legend: G episodes of one group; U turns of one episode, or of all in a group. A function for one
group takes what it needs of its episodes; `make_advantages` makes of it a function of the batch:
for each group and episode one number, or one for each turn, [U].

docs/objectives.md has all of them in a table: formula, source, settings, what stale samples become.
The values of `gae` are a critic's, on the trainer's ranks (`critic.py`); so its advantages
are computed there, at the start of a step (`values.py`), and not when a batch is handed over.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flash.trainer.advantage_settings import AdvantageSettings
from flash.types import Trajectory

Floats = NDArray[np.float64]
Group = Sequence[Trajectory]
OfEpisodes = list[Floats]  # for each episode an array of no dimension, or [U]
Advantages = Callable[[Sequence[Group]], list[OfEpisodes]]

# Below it a deviation is rounding.
_SMALLEST_DEVIATION = 1e-8


# ── one number an episode ────────────────────────────────────────────────────────────────────


def grpo(rewards_G: Floats, *, std: bool = True) -> Floats:
    """Rewards of one group, centred and divided by their standard deviation (with `std`), [G].

    Equal rewards give zeros: the group says nothing about which action is better.
    Raises ValueError for a group of one. Shao et al. 2024 (DeepSeekMath), section 4.1.2.
    """
    _compares(rewards_G)
    centred_G = rewards_G - rewards_G.mean()
    return _by_deviation(centred_G) if std else centred_G


def dr_grpo(rewards_G: Floats) -> Floats:
    """Rewards of one group, centred, [G]: grpo without std.

    Goes with `aggregation=fixed_length`. Liu et al. 2025 (Dr. GRPO), section 3.2.
    """
    return grpo(rewards_G, std=False)


def rloo(rewards_G: Floats) -> Floats:
    """Each reward less the mean of the others of its group, [G].

    That is dr_grpo times G/(G - 1), and without bias. Ahmadian et al. 2024, eq. 5.
    """
    return dr_grpo(rewards_G) * (len(rewards_G) / (len(rewards_G) - 1))


# ── one number a turn ────────────────────────────────────────────────────────────────────────


def discounted_returns(rewards_U: Floats, gamma: float) -> Floats:
    """G_t = r_t + γ·G_{t+1}, [U]."""
    returns_U = np.zeros(len(rewards_U))
    following = 0.0
    for turn in range(len(rewards_U) - 1, -1, -1):
        following = returns_U[turn] = rewards_U[turn] + gamma * following
    return returns_U


def turn_returns(rewards_GU: Sequence[Floats], *, gamma: float, std: bool) -> OfEpisodes:
    """Each turn's return, less the mean of all turns of the group, and divided by their deviation.

    Sutton & Barto 2018, section 13.4 (REINFORCE with a baseline).
    """
    _compares(rewards_GU)
    returns = [discounted_returns(rewards_U, gamma) for rewards_U in rewards_GU]
    advantages = _centred(np.concatenate(returns), std)
    return _split(advantages, returns)


def gigpo(
    rewards_G: Floats,
    rewards_GU: Sequence[Floats],
    states_GU: Sequence[Sequence[Hashable]],
    *,
    gamma: float,
    omega: float,
    std: bool,
) -> OfEpisodes:
    """Episodes against the group, plus ω times turns against those that began in the same state.

    A turn whose state nobody else met has only the first. Feng et al. 2025 (GiGPO), eqs. 3 to 8.
    """
    returns = [discounted_returns(rewards_U, gamma) for rewards_U in rewards_GU]
    flat = np.concatenate(returns)
    met: dict[Hashable, list[int]] = {}
    for index, state in enumerate(state for states in states_GU for state in states):
        met.setdefault(state, []).append(index)
    of_turns = np.zeros(len(flat))
    for turns in met.values():
        of_turns[turns] = _centred(flat[turns], std)
    of_episodes = grpo(rewards_G, std=std)
    return [
        of_episode + omega * of_its_turns
        for of_episode, of_its_turns in zip(of_episodes, _split(of_turns, returns), strict=True)
    ]


# ── one number a token ───────────────────────────────────────────────────────────────────────


def gae(rewards_T: Floats, values_T: Floats, *, gamma: float, lam: float) -> Floats:
    """Advantages of the trained tokens of one episode, [T], from their critic's values.

    Token t is an action in a state worth `values_T[t]` that brought `rewards_T[t]`; the next
    trained token's state is the next one, whatever was observed in between, and after the last
    token nothing is to come. Schulman et al. 2016, eq. 16.
    """
    advantages_T = np.zeros(len(rewards_T))
    advantage = next_value = 0.0
    for t in range(len(rewards_T) - 1, -1, -1):
        surprise = rewards_T[t] + gamma * next_value - values_T[t]
        advantage = advantages_T[t] = surprise + gamma * lam * advantage
        next_value = values_T[t]
    return advantages_T


# ── a whole batch ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class PerGroup:
    """A function of one group as one of the batch, which may be called with any part of it."""

    of_group: Callable[[Group], OfEpisodes]

    def __call__(self, groups: Sequence[Group]) -> list[OfEpisodes]:
        return [self.of_group(group) for group in groups]


def per_group(of_rewards: Callable[[Floats], Floats]) -> PerGroup:
    """A function of the rewards of one group, [G] to [G], as one of the batch."""
    return PerGroup(lambda group: list(of_rewards(_rewards(group))))


def make_advantages(settings: AdvantageSettings, *, finished: bool = True) -> Advantages:
    """The advantages of that name, with their settings, whitening and clip.

    The last two are left to the trainer unless `finished` (`TrainerConfig.finishes_advantages`).
    """
    computed = _computed(settings)
    if not finished:
        return computed
    whole = partial(_whitened, computed) if settings.whitens else computed
    if (bound := settings.clip) is None:
        return whole

    def clipped(of_group: OfEpisodes) -> OfEpisodes:
        return [np.clip(of_episode, -bound, bound) for of_episode in of_group]

    if isinstance(whole, PerGroup):
        of_group = whole.of_group
        return PerGroup(lambda group: clipped(of_group(group)))
    return lambda groups: [clipped(of_group) for of_group in whole(groups)]


def _computed(settings: AdvantageSettings) -> Advantages:
    name, parameters = settings.name, settings.parameters()
    if (of_batch := _OF_BATCH.get(name)) is not None:
        return partial(of_batch, **parameters)
    if (of_group := _OF_GROUP.get(name)) is not None:
        return PerGroup(partial(of_group, **parameters))
    return per_group(partial(_OF_REWARDS[name], **parameters))


def _whitened(computed: Advantages, groups: Sequence[Group]) -> list[OfEpisodes]:
    return whitened(computed(groups), groups)


def reinforce(groups: Sequence[Group], *, baseline: str) -> list[OfEpisodes]:
    """Rewards less the mean of the batch, of the group, or nothing. Williams 1992, section 4."""
    rewards = [_rewards(group) for group in groups]
    match baseline:
        case "group":
            return [list(dr_grpo(rewards_G)) for rewards_G in rewards]
        case "batch":
            mean = float(np.concatenate(rewards).mean())
        case _:
            mean = 0.0
    return [list(rewards_G - mean) for rewards_G in rewards]


def whitened(advantages: list[OfEpisodes], groups: Sequence[Group]) -> list[OfEpisodes]:
    """With mean 0 and deviation 1 over the trained tokens of the batch; all zeros if all equal."""
    values: list[float] = []
    counts: list[int] = []
    for of_group, group in zip(advantages, groups, strict=True):
        for of_episode, trajectory in zip(of_group, group, strict=True):
            if np.ndim(of_episode):
                values += of_episode.tolist()
                counts += _tokens_of_turns(trajectory)
            else:
                values.append(float(of_episode))
                counts.append(_tokens(trajectory))
    flat, weights = np.array(values), np.array(counts, dtype=float)
    if not weights.sum():
        return advantages
    mean = np.average(flat, weights=weights)
    deviation = float(np.sqrt(np.average((flat - mean) ** 2, weights=weights)))
    scale = 1 / deviation if deviation > _SMALLEST_DEVIATION else 0.0
    return [[(of_episode - mean) * scale for of_episode in of_group] for of_group in advantages]


def _turn_returns(group: Group, **settings: Any) -> OfEpisodes:
    return turn_returns([_turn_rewards(trajectory) for trajectory in group], **settings)


def _gigpo(group: Group, **settings: Any) -> OfEpisodes:
    return gigpo(
        _rewards(group),
        [_turn_rewards(trajectory) for trajectory in group],
        [trajectory.turn_states for trajectory in group],
        **settings,
    )


_OF_REWARDS: dict[str, Callable[..., Floats]] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}
_OF_GROUP: dict[str, Callable[..., OfEpisodes]] = {
    "turn_returns": _turn_returns,
    "gigpo": _gigpo,
    "gae": lambda group, **_: [np.zeros(()) for _ in group],
}
_OF_BATCH: dict[str, Callable[..., list[OfEpisodes]]] = {
    "reinforce": reinforce,
    "reinforce_pp": reinforce,
}


def _rewards(group: Group) -> Floats:
    return np.array([trajectory.reward for trajectory in group], dtype=np.float64)


def _turn_rewards(trajectory: Trajectory) -> Floats:
    if not trajectory.turn_rewards or len(trajectory.turn_states) != len(trajectory.turn_rewards):
        raise ValueError(
            "an episode came without the rewards and states of its turns, which these advantages "
            "need: use an agent that gives Trajectory.turn_rewards and turn_states, or set "
            "trainer.advantages to grpo, rloo or reinforce"
        )
    return np.array(trajectory.turn_rewards, dtype=np.float64)


def _tokens(trajectory: Trajectory) -> int:
    """Trained tokens of the episode."""
    return sum(int(np.count_nonzero(s.loss_mask > 0)) for s in trajectory.sequences)


def _tokens_of_turns(trajectory: Trajectory) -> list[int]:
    """Those of each of its turns, [U]."""
    counts_U = np.zeros(len(trajectory.turn_rewards), np.int64)
    for sequence in trajectory.sequences:
        np.add.at(counts_U, sequence.turns[sequence.loss_mask > 0], 1)
    of_turns: list[int] = counts_U.tolist()
    return of_turns


def _compares(members: Sequence[Any] | Floats) -> None:
    if len(members) < 2:
        raise ValueError(
            "a group of 1 has no relative advantage: set group_size to 2 or more, or "
            "trainer.advantages to reinforce (a baseline over the batch), reinforce_pp or gae"
        )


def to_unit_deviation(values: Floats) -> Floats:
    """With mean 0 and deviation 1; zeros if all are equal."""
    return _by_deviation(values - values.mean())


def _by_deviation(centred: Floats) -> Floats:
    deviation = float(np.sqrt((centred**2).mean()))
    return np.zeros_like(centred) if deviation < _SMALLEST_DEVIATION else centred / deviation


def _centred(values: Floats, std: bool) -> Floats:
    return to_unit_deviation(values) if std else values - values.mean()


def _split(flat: Floats, like: Sequence[Floats]) -> OfEpisodes:
    return np.split(flat, np.cumsum([len(one) for one in like])[:-1])
