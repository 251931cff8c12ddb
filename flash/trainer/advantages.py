"""From the rewards of a batch's episodes to their advantages.

Legend: G episodes of one group; U turns of one episode, or of all in a group. A function for one
group takes what it needs of its episodes; `make_advantages` makes of it a function of the batch:
for each group and episode one number, or one for each turn, [U].

docs/objectives.md has all of them in a table: formula, source, settings, what stale samples become.
The values of `gae` are a critic's, on the trainer's ranks (`critic.py`); so its advantages
are computed there, at the start of a step (`values.py`), and not when a batch is handed over.
"""

from collections.abc import Callable, Hashable, Sequence
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


def per_group(of_group: Callable[[Floats], Floats]) -> Advantages:
    """A function of the rewards of one group, [G] to [G], as one of the batch."""
    return lambda groups: [list(of_group(_rewards(group))) for group in groups]


def make_advantages(settings: AdvantageSettings, *, finished: bool = True) -> Advantages:
    """The advantages of that name, with their settings, whitening and clip.

    The last two are left to the trainer unless `finished` (`TrainerConfig.finishes_advantages`).
    """
    parameters = settings.parameters()
    of_batch = _OF_BATCH.get(settings.name)
    of_rewards = _OF_REWARDS.get(settings.name)
    if of_batch is not None:
        compute: Advantages = partial(of_batch, **parameters)
    else:
        assert of_rewards is not None
        compute = per_group(partial(of_rewards, **parameters))

    def advantages(groups: Sequence[Group]) -> list[OfEpisodes]:
        computed = compute(groups)
        if not finished:
            return computed
        if settings.whitens:
            computed = whitened(computed, groups)
        if settings.clip is not None:
            bound = settings.clip
            computed = [[np.clip(a, -bound, bound) for a in of_group] for of_group in computed]
        return computed

    return advantages


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
    values, counts = [], []
    for of_group, group in zip(advantages, groups, strict=True):
        for of_episode, trajectory in zip(of_group, group, strict=True):
            values.append(np.atleast_1d(of_episode))
            counts.append(_tokens(trajectory, np.ndim(of_episode) > 0))
    flat, weights = np.concatenate(values), np.concatenate(counts).astype(float)
    if not weights.sum():
        return advantages
    mean = np.average(flat, weights=weights)
    deviation = float(np.sqrt(np.average((flat - mean) ** 2, weights=weights)))
    scale = 1 / deviation if deviation > _SMALLEST_DEVIATION else 0.0
    return [[(of_episode - mean) * scale for of_episode in of_group] for of_group in advantages]


def _turn_returns(groups: Sequence[Group], **settings: Any) -> list[OfEpisodes]:
    return [turn_returns([_turn_rewards(t) for t in group], **settings) for group in groups]


def _gigpo(groups: Sequence[Group], **settings: Any) -> list[OfEpisodes]:
    return [
        gigpo(
            _rewards(group),
            [_turn_rewards(trajectory) for trajectory in group],
            [trajectory.turn_states for trajectory in group],
            **settings,
        )
        for group in groups
    ]


_OF_REWARDS: dict[str, Callable[..., Floats]] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}
_OF_BATCH: dict[str, Callable[..., list[OfEpisodes]]] = {
    "reinforce": reinforce,
    "reinforce_pp": reinforce,
    "turn_returns": _turn_returns,
    "gigpo": _gigpo,
    "gae": lambda groups, **_: [[np.zeros(()) for _ in group] for group in groups],
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


def _tokens(trajectory: Trajectory, of_turns: bool) -> NDArray[np.int64]:
    """Trained tokens of the episode, [1], or of each of its turns, [U]."""
    if not of_turns:
        return np.array([sum(int((s.loss_mask > 0).sum()) for s in trajectory.sequences)])
    counts = np.zeros(len(trajectory.turn_rewards), np.int64)
    for sequence in trajectory.sequences:
        np.add.at(counts, sequence.turns[sequence.loss_mask > 0], 1)
    return counts


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
