"""Sokoban on generated rooms, as text: push every box onto a target; none can be pulled.

    # # # # # #
    # _ P _ _ #      # wall      _ floor
    # _ X _ _ #      O target    X box    √ box on a target
    # _ _ # O #      P you       S you on a target
    # _ _ # # #
    # # # # # #

A room is made backwards, by pulling boxes off their targets: so it can be solved, and how many
pushes that takes is known. A set of fields is an integer with the bit `row * size + column` of
each.
"""

import heapq
import itertools
import random
import string
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import gymnasium
from gymnasium import spaces

from flash.types import Observation, Task, Turn

Split = Literal["train", "heldout"]
Seen = Literal["grid", "words"]
_State = tuple[int, int]  # where boxes are, and where the player may be between two pushes

MOVES = ("Up", "Down", "Left", "Right")
SEPARATOR = "||"  # of several moves in one answer, as RAGEN has it
STEP, BOX_ON, BOX_OFF, ALL_ON = -0.1, 1.0, -1.0, 10.0  # gym-sokoban's rewards

_BY_WORD = {move.lower(): move for move in MOVES}
_GOAL = "push every box onto a target"
_HOW = (
    f"Walk into a box to push it. Answer {', '.join(MOVES)}, or several with {SEPARATOR} between."
)
_RULES: dict[Seen, str] = {
    "grid": "# is a wall, _ floor, O a target, X a box, √ a box on a target, P you, S you on a "
    f"target. {_HOW}",
    "words": "Each box is told as seen from you, and each free target as seen from the box; a "
    f"box on a target is done. {_HOW}",
}
_NO_MOVE = "That is no move."
_SYMBOLS = "#_OX√PS"
_GROUND = {
    "#": "wall",
    "_": "floor",
    "O": "target",
    "X": "box",
    "√": "done",
    "P": "you",
    "S": "you",
}
_SAME_ROW, _SAME_COLUMN = "same row", "same column"
_FLOOR_SHARE = 0.75  # of the fields inside the outer walls
_HELDOUT_SHARE = 5  # one room of so many is held out
_ATTEMPTS = 1_000  # at a room with the pushes, and of the split, that are asked for
_MOST_STATES = 400  # of an attempt, so that none takes longer than 10 ms


@dataclass(frozen=True)
class Room:
    """A state of the game: `player` is the number of a field, the others are sets of fields."""

    size: int
    floor: int
    targets: int
    boxes: int
    player: int

    @property
    def solved(self) -> bool:
        return self.boxes == self.targets

    def after(self, move: str) -> "Room":
        """The room after one of `MOVES`; the same one if something is in the way."""
        step = _steps(self.size)[move]
        ahead = 1 << self.player + step
        if not self.floor & ahead:
            return self
        moved = replace(self, player=self.player + step)
        if not self.boxes & ahead:
            return moved
        behind = 1 << self.player + 2 * step
        if not self.floor & ~self.boxes & behind:
            return self
        return replace(moved, boxes=self.boxes ^ ahead | behind)

    def text(self) -> str:
        """A line for each row, with spaces between fields, so that each is a token."""
        rows = range(0, self.size**2, self.size)
        return "\n".join(
            " ".join(self._symbol(row + column) for column in range(self.size)) for row in rows
        )

    def words(self) -> str:
        """Where each box is, and from there each free target; what is next to them and to you.

        Walls farther away are not told.
        """
        free = list(_fields(self.targets & ~self.boxes))
        told = list[str]()
        for box in _fields(self.boxes):
            told.append(f"box {self._way(self.player, box)}")
            told += [f"target {self._way(box, target)}" for target in free]
            told.append(self._around(box))
        return "\n".join([*told, f"you {self._around(self.player)}"])

    def _way(self, start: int, end: int) -> str:
        """From field to field, in fields, as `2 up 1 left`."""
        rows, columns = end // self.size - start // self.size, end % self.size - start % self.size
        vertical = f"{abs(rows)} {'up' if rows < 0 else 'down'}" if rows else _SAME_ROW
        horizontal = f"{abs(columns)} {'left' if columns < 0 else 'right'}"
        return f"{vertical} {horizontal if columns else _SAME_COLUMN}"

    def _around(self, field: int) -> str:
        near = {move.lower(): field + step for move, step in _steps(self.size).items()}
        return " ".join(f"{move} {_GROUND[self._symbol(there)]}" for move, there in near.items())

    def _symbol(self, field: int) -> str:
        target = self.targets >> field & 1
        if field == self.player:
            return "S" if target else "P"
        if self.boxes >> field & 1:
            return "√" if target else "X"
        if target:
            return "O"
        return "_" if self.floor >> field & 1 else "#"


class SokobanEnv(gymnasium.Env[str, str]):
    """One room after another; the action is a move, or several with `||` between them.

    Case and spaces don't matter. What follows a word that is no move is not played, and such a
    word counts as a step that moves nothing, as does a move against a wall.

    Rewards are gym-sokoban's, summed over an answer's moves: -0.1 for each, 1 for a box that comes
    onto a target, -1 for one that leaves it, 10 for the last, which ends the episode.

    Args:
        size: rows and columns with the outer walls, 5 to 12.
        boxes: how many, and as many targets.
        min_pushes, max_pushes: of the shortest solution, counted in pushes.
        observation: `grid`, or `words` for small policies, to which a grid does not show where
            things are: boxes and targets by their distance, and what is next to boxes and to you.
        rewards: `gym_sokoban`, or `success`: 1 when all boxes are on targets, 0 for all else.
        split: `train` or `heldout`; a room belongs to one of them, whatever the seed.
        max_steps: the episode is truncated after so many moves.
        wander: how often `demonstrate` makes a random move, which is imitated: what a policy learns
            from an untidy teacher, and reinforcement then removes.

    Raises ValueError for an option that can't be, and where hardly a room is as they ask.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (gymnasium's own type)
        "render_modes": [],
        "deterministic": True,
    }
    observation_space = spaces.Text(max_length=20_000, charset=f"{string.printable}{_SYMBOLS}")
    action_space = spaces.Text(min_length=0, max_length=1_000, charset=f"{''.join(MOVES)}| ")

    def __init__(
        self,
        *,
        size: int = 6,
        boxes: int = 1,
        min_pushes: int = 1,
        max_pushes: int = 10,
        observation: Seen = "grid",
        rewards: Literal["gym_sokoban", "success"] = "gym_sokoban",
        split: Split = "train",
        max_steps: int = 30,
        wander: float = 0.0,
    ) -> None:
        numbers = {"size": size, "boxes": boxes, "min_pushes": min_pushes,
                   "max_pushes": max_pushes, "max_steps": max_steps}  # fmt: skip
        for name, value in numbers.items():
            if not isinstance(value, int):
                raise ValueError(f"{name}={value!r} must be a whole number")
        if not 5 <= size <= 12:
            raise ValueError(f"size={size} must be 5 to 12, outer walls included")
        if not 1 <= boxes <= (size - 2) ** 2 // 4:
            raise ValueError(f"boxes={boxes} must be 1 to {(size - 2) ** 2 // 4} at size={size}")
        if not 1 <= min_pushes <= max_pushes:
            raise ValueError(
                f"min_pushes={min_pushes} must be at least 1, and at most max_pushes={max_pushes}"
            )
        if observation not in ("grid", "words"):
            raise ValueError(f"observation={observation!r} must be 'grid' or 'words'")
        if rewards not in ("gym_sokoban", "success"):
            raise ValueError(f"rewards={rewards!r} must be 'gym_sokoban' or 'success'")
        if split not in ("train", "heldout"):
            raise ValueError(f"split={split!r} must be 'train' or 'heldout'")
        if max_steps < 1:
            raise ValueError(f"max_steps={max_steps} must be at least 1")
        if not 0 <= wander < 1:
            raise ValueError(f"wander={wander} must be 0 or more and below 1")
        self._rooms = (size, boxes, min_pushes, max_pushes, split)
        self._seen: Seen = observation
        self._success_only = rewards == "success"
        self._max_steps = max_steps
        self._wander = wander
        self._room = generate(0, *self._rooms)  # tells now if there is none
        self._steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self._room = generate(seed, *self._rooms)
        self._steps = 0
        return f"{_RULES[self._seen]}\n{self._shown()}", self._info()

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        reward, known = 0.0, True
        for word in action.lower().split(SEPARATOR):
            move = _BY_WORD.get(word.strip())
            known = move is not None
            reward += self._play(move)
            if not known or self._room.solved or self._steps == self._max_steps:
                break
        text = self._shown() if known else f"{_NO_MOVE}\n{self._shown()}"
        solved = self._room.solved
        truncated = not solved and self._steps >= self._max_steps
        if self._success_only:
            reward = float(solved)
        return text, reward, solved, truncated, self._info()

    def _play(self, move: str | None) -> float:
        """gym-sokoban's reward of one step; None moves nothing."""
        self._steps += 1
        before = (self._room.boxes & self._room.targets).bit_count()
        if move is not None:
            self._room = self._room.after(move)
        more = (self._room.boxes & self._room.targets).bit_count() - before
        return (
            STEP
            + (BOX_ON if more > 0 else BOX_OFF if more < 0 else 0.0)
            + (ALL_ON if self._room.solved else 0.0)
        )

    def _shown(self) -> str:
        return self._room.text() if self._seen == "grid" else self._room.words()

    def _info(self) -> dict[str, Any]:
        return {
            "goal": _GOAL,
            "admissible_commands": list(MOVES),
            "success": self._room.solved,
        }

    # ── for a small policy ───────────────────────────────────────────────────────────────────

    def vocabulary(self) -> list[str]:
        """Every word of observations and actions; the rules are one.

        In words a distance is one too, and so is what lies in a direction.
        """
        words = [_RULES[self._seen], _GOAL, _NO_MOVE, SEPARATOR, *MOVES]
        if self._seen == "grid":
            return [*words, *_SYMBOLS]
        size, *_ = self._rooms
        ways = [f"{fields} {move}" for fields in range(1, size - 2) for move in MOVES]
        near = [f"{move} {ground}" for move in MOVES for ground in sorted(set(_GROUND.values()))]
        return [*words, *ways, *near, _SAME_ROW, _SAME_COLUMN, "box", "target", "you"]

    def demonstrate(self, task: Task) -> list[Turn]:
        """A shortest solution, a move a turn, with the random moves that `wander` asks for.

        None of those makes the room insoluble. It goes on past `max_steps`, to show an end.
        """
        rng = random.Random(f"demonstrate {task.seed}")
        text, info = self.reset(seed=task.seed, options=dict(task.options))
        observation, turns = Observation(text=text, info=info), list[Turn]()
        way = solve(self._room)
        while way:
            move = way[0]
            if rng.random() < self._wander:
                move = rng.choice(MOVES)
            after = self._room.after(move)
            rest = way[1:] if move == way[0] else solve(after)
            if rest is None:
                move, rest = way[0], way[1:]
            turns.append(Turn(observation, move))
            text, reward, _, _, info = self.step(move)
            observation, way = Observation(text=text, reward=reward, info=info), rest
        return turns


# ── rooms ────────────────────────────────────────────────────────────────────────────────────


@lru_cache(maxsize=4096)  # a group's episodes have the same
def generate(
    seed: int, size: int, boxes: int, min_pushes: int, max_pushes: int, split: Split
) -> Room:
    """The first room of the seed that belongs to the split.

    Its shortest solution, counted in pushes, has a length drawn from those that are asked for, or
    the longest that was found below it. Raises ValueError if `_ATTEMPTS` found none.
    """
    rng = random.Random(f"sokoban {seed}")
    for _ in range(_ATTEMPTS):
        room = _attempt(rng, size, boxes, min_pushes, max_pushes)
        if room is not None:
            held_out = zlib.crc32(room.text().encode()) % _HELDOUT_SHARE == 0
            if held_out == (split == "heldout"):
                return room
    raise ValueError(
        f"no room of size={size} with boxes={boxes} and min_pushes={min_pushes} was found in "
        f"{_ATTEMPTS} attempts: ask for fewer pushes, another size or other boxes"
    )


def _attempt(
    rng: random.Random, size: int, boxes: int, min_pushes: int, max_pushes: int
) -> Room | None:
    floor = _floor(rng, size)
    targets = sum(1 << field for field in rng.sample(list(_fields(floor)), boxes))
    wanted = rng.randint(min_pushes, max_pushes)
    layers = itertools.islice(_layers(floor, targets, size), wanted + 1)
    *_, (pushes, layer) = enumerate(layers)
    if pushes < min_pushes:
        return None
    placed, region = rng.choice(layer)
    player = rng.choice(list(_fields(region)))
    return Room(size=size, floor=floor, targets=targets, boxes=placed, player=player)


def _floor(rng: random.Random, size: int) -> int:
    """Fields that hang together: those that a random walk came by."""
    row, column = rng.randrange(1, size - 1), rng.randrange(1, size - 1)
    floor = 1 << row * size + column
    while floor.bit_count() < _FLOOR_SHARE * (size - 2) ** 2:
        down, right = rng.choice(((-1, 0), (1, 0), (0, -1), (0, 1)))
        row = min(max(row + down, 1), size - 2)
        column = min(max(column + right, 1), size - 2)
        floor |= 1 << row * size + column
    return floor


def _layers(floor: int, targets: int, size: int) -> Iterator[list[_State]]:
    """The states that fewest pushes solve: by none, by one, and so on.

    The last layer is not whole where all together would be more than `_MOST_STATES`.
    """
    layer, free = list[_State](), floor & ~targets
    while free:
        region = _reach(free & -free, free, size)
        layer.append((targets, region))
        free &= ~region
    seen = set(layer)
    while layer:
        yield layer
        pulled = (before for state in layer for before in _pulls(*state, floor, size))
        layer = list(itertools.islice(_new(pulled, seen), max(0, _MOST_STATES - len(seen))))


def _new(states: Iterable[_State], seen: set[_State]) -> Iterator[_State]:
    """Those that were not seen, which then are."""
    for state in states:
        if state not in seen:
            seen.add(state)
            yield state


def _pulls(boxes: int, region: int, floor: int, size: int) -> Iterator[_State]:
    """The states from which one push leads here."""
    for box in _fields(boxes):
        for step in _steps(size).values():
            # The push ended with the player where the box had been.
            came_from, stood = 1 << box - step, box - 2 * step
            if region & came_from and floor & ~boxes & 1 << stood:
                moved = boxes ^ 1 << box | came_from
                yield moved, _reach(1 << stood, floor & ~moved, size)


def _reach(start: int, free: int, size: int) -> int:
    """The free fields that the player can walk to."""
    seen = fresh = start
    while fresh:
        fresh = (fresh << 1 | fresh >> 1 | fresh << size | fresh >> size) & free & ~seen
        seen |= fresh
    return seen


@lru_cache
def _steps(size: int) -> dict[str, int]:
    """What each move adds to the number of the player's field."""
    return dict(zip(MOVES, (-size, size, -1, 1), strict=True))


def _fields(of: int) -> Iterator[int]:
    while of:
        lowest = of & -of
        yield lowest.bit_length() - 1
        of ^= lowest


# ── solutions ────────────────────────────────────────────────────────────────────────────────


def solve(room: Room) -> list[str] | None:
    """The fewest moves that solve the room, by A*; None if nothing does."""
    pushes = _pushes_alone(room)
    made: dict[Room, list[str]] = {room: []}
    numbers = itertools.count()  # of two equal ones in the queue the first is taken
    queue = [(0, next(numbers), room)]
    while queue:
        _, _, here = heapq.heappop(queue)
        if here.solved:
            return made[here]
        for move in MOVES:
            there = here.after(move)
            boxes = list(_fields(there.boxes))
            known = there in made and len(made[there]) <= len(made[here]) + 1
            if known or any(box not in pushes for box in boxes):
                continue
            made[there] = [*made[here], move]
            least = len(made[there]) + sum(pushes[box] for box in boxes)
            heapq.heappush(queue, (least, next(numbers), there))
    return None


def _pushes_alone(room: Room) -> dict[int, int]:
    """How many pushes each field is from a target, for a box that nothing is in the way of.

    A box is lost on those that are left out.
    """
    layer, pushes = set(_fields(room.targets)), dict[int, int]()
    distance = 0
    while layer:
        pushes |= dict.fromkeys(layer, distance)
        distance += 1
        layer = {
            field - step
            for field in layer
            for step in _steps(room.size).values()
            if room.floor >> field - step & 1 and room.floor >> field - 2 * step & 1
        } - pushes.keys()
    return pushes


gymnasium.register("flash/Sokoban-v0", entry_point="flash.envs.sokoban:SokobanEnv")
