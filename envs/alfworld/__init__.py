"""ALFWorld as a `gymnasium.Env`: household tasks in text, with generated or published games.

    env = AlfWorldEnv(split="heldout", max_turns=20)
    text, info = env.reset(seed=7)            # the seed decides the game
    text, reward, terminated, truncated, info = env.step("go to drawer 1")

Rewards are 1 for the command that fulfils the goal, which ends the episode, and 0 for every other.
"""

import random
import re
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import gymnasium
from gymnasium import spaces

from flash.types import Observation, Task, Turn

from .engine import Engine, State
from .expert import Expert
from .game import TASK_TYPES, Game
from .generate import HELD_OUT_PLANS, Split, check, entity_counts, generate

__all__ = ["HELD_OUT_PLANS", "TASK_TYPES", "AlfWorldEnv", "Expert", "Game", "generate"]

_PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
_ENTITY = re.compile(r"\b([a-z]+ \d+)\b")
# Pieces that texts, goals and commands are made of, in lower case. Entities come in addition.
_PHRASES = (
    "-= welcome to textworld, alfred! =-",
    "you are in the middle of a room. looking quickly around you, you see",
    "your task is to:",
    "put a", "put some", "put a clean", "put a hot", "put a cool", "put two", "find two",
    "clean some", "heat some", "cool some", "in", "on", "and put it in", "and put them in",
    "look at", "under the", "examine the", "with the",
    "you arrive at", "on the", "in it, you see", "you see", "nothing", "is closed", "is open",
    "you open the", "you close the", "you pick up the", "from the", "you move the", "to the",
    "you clean the", "you heat the", "you cool the", "using the",
    "you turn on the", "you turn off the", "you don't see any switch on the",
    "you are carrying:", "you are not carrying anything", "you are facing the",
    "next to it, you see", "there's nothing special about", "this is a", "this", "normal",
    "hot", "clean", "cold", "cool", "sliced", "off", "nothing happens",
    "go to", "open", "close", "take", "from", "move", "to", "heat", "with", "use", "slice",
    "examine", "inventory", "look", "help", "available commands:",
)  # fmt: skip


class AlfWorldEnv(gymnasium.Env[str, str]):
    """One ALFWorld game after another.

    Args:
        engine: "native" (fast, same texts) or "textworld" (the engine that ALFWorld ships).
        games: folder with `game.tw-pddl` files, searched with all its subfolders; the seed picks
            one. None: games are generated from the seed.
        split: of generated games, by floor plan; see `generate`.
        task_types: which of the six task types.
        max_receptacles, max_objects: make generated games smaller; see `generate`.
        max_turns: an episode is truncated after that many commands.
        admissible: "none", "info" (`info["admissible_commands"]`) or "text" (also a line of the
            observation).
        detours: how often `demonstrate` does something random that is not to be imitated.
        wander: how often it does something random that is possible, and that is imitated: what a
            policy learns from an untidy teacher, and reinforcement then removes.

    `info` holds `goal` always and `success` at the end.
    `reset(options={"game": path})` plays that file, whatever the seed.
    Raises ValueError for an option that can't be, naming it.
    """

    metadata = {  # noqa: RUF012 (gymnasium's own declaration)
        "render_modes": [],
        "deterministic": True,
    }

    def __init__(
        self,
        *,
        engine: Literal["native", "textworld"] = "native",
        games: str | Path | None = None,
        split: Split = "train",
        task_types: Sequence[str] = TASK_TYPES,
        max_receptacles: int | None = None,
        max_objects: int | None = None,
        max_turns: int = 50,
        admissible: Literal["none", "info", "text"] = "info",
        detours: float = 0.15,
        wander: float = 0.0,
    ) -> None:
        check(split, task_types, max_receptacles, max_objects)
        if max_turns < 1:
            raise ValueError(f"max_turns={max_turns}: give 1 or more")
        if admissible not in ("none", "info", "text"):
            raise ValueError(f"admissible={admissible!r}: choose none, info or text")
        for name, share in (("detours", detours), ("wander", wander)):
            if share < 0 or detours + wander >= 1:
                raise ValueError(
                    f"{name}={share}: give a share of 0 or more, detours + wander below 1"
                )
        self._generate = lru_cache(maxsize=256)(
            lambda seed: generate(
                seed,
                split=split,
                task_types=tuple(task_types),
                max_receptacles=max_receptacles,
                max_objects=max_objects,
            )
        )
        self._files = None if games is None else _game_files(Path(games), task_types)
        self._engine = _engine(engine)
        self._max_turns = max_turns
        self._admissible = admissible
        self._detours = detours
        self._wander = wander
        self._turn = 0
        self._goal = ""
        self.observation_space = spaces.Text(max_length=20_000, charset=_PRINTABLE)
        self.action_space = spaces.Text(min_length=0, max_length=1_000, charset=_PRINTABLE)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        game = self._choose(seed, options or {})
        self._turn = 0
        self._goal = game.goal
        self._state = self._engine.reset(game)
        return self._text(), self._info(done=False)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        state = self._state = self._engine.step(action)
        self._turn += 1
        truncated = not state.done and self._turn >= self._max_turns
        info = self._info(done=state.done or truncated)
        return self._text(), state.reward, state.done, truncated, info

    def close(self) -> None:
        self._engine.close()

    def vocabulary(self) -> list[str]:
        """Phrases and entity names; each becomes one token of a small policy."""
        counts = entity_counts()
        numbered = [f"{kind} {number}" for kind in counts for number in range(1, counts[kind] + 1)]
        return [*_PHRASES, _help(), *counts, *numbered]

    def demonstrate(self, task: Task) -> list[Turn]:
        """The expert's episode on the task's game; takes the place of the episode in progress.

        The same task gives the same demonstration. It goes on past `max_turns`, so that detours
        don't keep it from showing how a game ends.
        """
        rng = random.Random(f"demonstrate {task.seed}")
        text, info = self.reset(seed=task.seed, options=dict(task.options))
        observation = Observation(text=text, info=info)
        expert = Expert(self._goal, self._state.text, rng)
        names: set[str] = set()
        turns: list[Turn] = []
        while not observation.terminated and len(turns) < 3 * self._max_turns:
            names.update(_ENTITY.findall(self._state.text))
            action, imitate = self._demonstrated(rng, expert, sorted(names))
            turns.append(Turn(observation, action, imitate))
            text, reward, terminated, truncated, info = self.step(action)
            expert.observe(self._state.text, action)
            observation = Observation(
                text=text, reward=reward, terminated=terminated, truncated=truncated, info=info
            )
        return turns

    def _demonstrated(
        self, rng: random.Random, expert: Expert, names: list[str]
    ) -> tuple[str, bool]:
        """The teacher's next command, and whether to imitate it."""
        chance = rng.random()
        if chance < self._detours:
            return _detour(rng, self._state, names), False
        if chance < self._detours + self._wander:
            return _pick(rng, self._state.admissible), True
        return expert.act(), True

    def _choose(self, seed: int, options: dict[str, Any]) -> Game:
        if path := options.get("game"):
            return _read(Path(path))
        if self._files is not None:
            return _read(self._files[seed % len(self._files)])
        return self._generate(seed)

    def _text(self) -> str:
        state = self._state
        if self._admissible != "text":
            return state.text
        return f"{state.text}\nAvailable commands: {', '.join(state.admissible)}"

    def _info(self, *, done: bool) -> dict[str, Any]:
        info: dict[str, Any] = {"goal": self._goal}
        if self._admissible != "none":
            info["admissible_commands"] = list(self._state.admissible)
        if done:
            info["success"] = self._state.won
        return info


def _detour(rng: random.Random, state: State, names: list[str]) -> str:
    """Half the time something that is possible here, half the time a guess that mostly fails."""
    if rng.random() < 0.5 and state.admissible:
        return _pick(rng, state.admissible)
    one, other = _pick(rng, names), _pick(rng, names)
    return _pick(rng, (f"go to {one}", f"open {one}", f"take {one} from {other}",
                       f"move {one} to {other}"))  # fmt: skip


@cache
def _help() -> str:
    """The answer to "help", a page long: one token for it keeps an episode short."""
    engine = _engine("native")
    engine.reset(generate(0))
    return engine.step("help").text


def _pick(rng: random.Random, items: Sequence[str]) -> str:
    return items[int(rng.random() * len(items))]


def _engine(name: str) -> Engine:
    if name == "native":
        from .native import NativeEngine  # noqa: PLC0415 (each engine only where it is wanted)

        return NativeEngine()
    if name == "textworld":
        from .textworld_engine import TextWorldEngine  # noqa: PLC0415

        return TextWorldEngine()
    raise ValueError(f"engine={name!r}: choose native or textworld")


def _game_files(folder: Path, task_types: Sequence[str]) -> list[Path]:
    """Every game file below the folder that is of one of the task types, in a fixed order."""
    if not folder.is_dir():
        raise ValueError(f"games={str(folder)!r} is not a folder: give one with game.tw-pddl files")
    wanted = set(task_types)
    files = [path for path in sorted(folder.rglob("game.tw-pddl")) if _task_type(path) in wanted]
    if not files:
        raise ValueError(
            f"games={str(folder)!r} has no game.tw-pddl of the task types {sorted(wanted)}: "
            "choose another folder or more task types"
        )
    return files


def _task_type(path: Path) -> str:
    """From the name of the published folders; from the file itself where that tells nothing."""
    for part in path.parts[-3:-1]:
        kind = part.split("-")[0]
        if kind.startswith(("pick_", "look_")):
            return kind
    try:
        return _read(path).task_type
    except ValueError:
        return ""


@lru_cache(maxsize=256)
def _read(path: Path) -> Game:
    return Game.read(path)


if "flash/AlfWorld-v0" not in gymnasium.registry:
    gymnasium.register(id="flash/AlfWorld-v0", entry_point="flash.envs.alfworld:AlfWorldEnv")
