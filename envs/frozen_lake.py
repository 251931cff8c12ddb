"""gymnasium's FrozenLake as text: cross the ice to the goal without falling into a hole.

The map is generated from the seed. The text is built from the state, because gymnasium's own
rendering is made for terminals: where you are, what lies around you, where the goal is.
"""

import string
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import gymnasium
from gymnasium import spaces
from gymnasium.envs.toy_text.frozen_lake import generate_random_map

from flash.types import Observation, Task, Turn

_ACTIONS = ("left", "down", "right", "up")  # in gymnasium's order
_MOVES = {"left": (0, -1), "down": (1, 0), "right": (0, 1), "up": (-1, 0)}
_GROUND = {"S": "ice", "F": "ice", "H": "hole", "G": "goal"}
_HELDOUT_SHARE = 5  # one map of so many is held out


class FrozenLakeTextEnv(gymnasium.Env[str, str]):
    """FrozenLake-v1 on generated maps, in words.

    Reward 1 at the goal, else 0. An unknown action leaves you where you are and says so.

    Args:
        size: rows and columns of the map, 2 to 9.
        ice: the chance of a field to be ice rather than a hole.
        slippery: whether a step may go astray, as in gymnasium's default.
        split: `train` or `heldout`; a map belongs to one of them, whatever the seed.
        max_turns: the episode is truncated after so many actions.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (gymnasium's own type)
        "render_modes": [],
        "deterministic": True,
    }

    def __init__(
        self,
        *,
        size: int = 4,
        ice: float = 0.8,
        slippery: bool = False,
        split: Literal["train", "heldout"] = "train",
        max_turns: int = 16,
    ) -> None:
        if not isinstance(size, int) or not 2 <= size <= 9:
            raise ValueError(f"size={size} must be 2 to 9, so that a coordinate is one digit")
        if not 0 < ice <= 1:
            raise ValueError(f"ice={ice} must be above 0 and at most 1")
        if split not in ("train", "heldout"):
            raise ValueError(f"split={split!r} must be 'train' or 'heldout'")
        if max_turns < 1:
            raise ValueError(f"max_turns={max_turns} must be at least 1")
        self.observation_space = spaces.Text(max_length=400, charset=string.printable)
        self.action_space = spaces.Text(max_length=100, min_length=0, charset=string.printable)
        self._size = size
        self._ice = ice
        self._slippery = slippery
        self._split = split
        self._max_turns = max_turns
        self._rows: list[str] = []
        self._lake: gymnasium.Env[int, int] | None = None
        self._position = 0
        self._turns = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._rows = self._map(seed)
        self._lake = gymnasium.make(
            "FrozenLake-v1", desc=self._rows, is_slippery=self._slippery, max_episode_steps=-1
        )
        self._position, _ = self._lake.reset(seed=seed)
        self._turns = 0
        return self._describe(), {"goal": "reach the goal", "admissible_commands": list(_ACTIONS)}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        assert self._lake is not None, "reset comes before step"
        self._turns += 1
        truncated = self._turns >= self._max_turns
        info: dict[str, Any] = {"admissible_commands": list(_ACTIONS), "success": False}
        word = action.strip().lower()
        if word not in _ACTIONS:
            return f"nothing happens . {self._describe()}", 0.0, False, truncated, info
        self._position, reward, terminated, _, _ = self._lake.step(_ACTIONS.index(word))
        info["success"] = terminated and float(reward) > 0
        return self._describe(), float(reward), terminated, truncated and not terminated, info

    # ── for a small policy ───────────────────────────────────────────────────────────────────

    def vocabulary(self) -> list[str]:
        """Every word of observations and actions."""
        numbers = [str(n) for n in range(1, self._size + 1)]
        words = ["at", "row", "column", "reach", "the", "nothing", "happens", "edge"]
        return [*words, *sorted(set(_GROUND.values())), ".", *_ACTIONS, *numbers]

    def demonstrate(self, task: Task) -> list[Turn]:
        """The shortest way; without slipping it always arrives."""
        text, info = self.reset(seed=task.seed, options=dict(task.options))
        turns: list[Turn] = []
        observation, done = Observation(text=text, info=info), False
        while not done:
            action = self._way(self._position)
            turns.append(Turn(observation, action))
            text, reward, terminated, truncated, info = self.step(action)
            observation = Observation(text=text, reward=reward, info=info)
            done = terminated or truncated
        return turns

    # ── the state in words ───────────────────────────────────────────────────────────────────

    def _map(self, seed: int) -> list[str]:
        """The first generated map of the seed that belongs to the split."""
        for attempt in range(10_000):
            rows = generate_random_map(self._size, self._ice, seed=seed * 10_000 + attempt)
            held_out = zlib.crc32("".join(rows).encode()) % _HELDOUT_SHARE == 0
            if held_out == (self._split == "heldout"):
                return rows
        raise ValueError(f"no {self._split} map at size={self._size}, ice={self._ice}: change them")

    def _describe(self) -> str:
        row, column = divmod(self._position, self._size)
        around = " . ".join(
            f"{name} {self._ground(row + down, column + right)}"
            for name, (down, right) in _MOVES.items()
        )
        return (
            f"at row {row + 1} column {column + 1} . {around} . "
            f"goal at row {self._size} column {self._size}"
        )

    def _ground(self, row: int, column: int) -> str:
        if 0 <= row < self._size and 0 <= column < self._size:
            return _GROUND[self._rows[row][column]]
        return "edge"

    def _way(self, start: int) -> str:
        """The first action of a shortest way from `start` to the goal."""
        goal = self._size * self._size - 1
        towards = {goal: ""}
        queue = deque([goal])
        while queue:
            here = queue.popleft()
            for name, there in self._neighbours(here):
                if there not in towards and self._ground(*divmod(there, self._size)) != "hole":
                    # We walk back from the goal, so the action from there is the opposite one.
                    towards[there] = _ACTIONS[(_ACTIONS.index(name) + 2) % 4]
                    queue.append(there)
        return towards[start]

    def _neighbours(self, position: int) -> Iterator[tuple[str, int]]:
        row, column = divmod(position, self._size)
        for name, (down, right) in cast(Mapping[str, tuple[int, int]], _MOVES).items():
            if 0 <= row + down < self._size and 0 <= column + right < self._size:
                yield name, (row + down) * self._size + column + right


gymnasium.register(
    "flash/FrozenLakeText-v0", entry_point="flash.envs.frozen_lake:FrozenLakeTextEnv"
)
