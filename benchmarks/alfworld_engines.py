"""How fast the ALFWorld engines are: native, TextWorld's as made faster here, and as shipped.

    python benchmarks/alfworld_engines.py [--games 6] [--steps 40] [--out alfworld_engines.json]

Every engine plays the same commands on the same games (generated, or the files under --folder),
each in a process of its own, and must give the same texts. Prints a table with the ratios to the
engine as shipped, and writes the figures as JSON. All times are in milliseconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

from flash.envs.alfworld.engine import Engine, State
from flash.envs.alfworld.game import TASK_TYPES, Game
from flash.envs.alfworld.generate import generate
from flash.envs.alfworld.native import NativeEngine
from flash.envs.alfworld.textworld_engine import TextWorldEngine

ENGINES = ("native", "textworld", "shipped")
GROUP_SIZE = 8


class ShippedEngine:
    """The alfworld package's own engine, nothing changed: a file is loaded for each game."""

    def __init__(self) -> None:
        import textworld  # noqa: PLC0415
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler  # noqa: PLC0415
        from textworld.envs.pddl import PddlEnv  # noqa: PLC0415

        infos = textworld.EnvInfos(feedback=True, won=True, admissible_commands=True)
        self._env = AlfredDemangler(PddlEnv(infos), shuffle=False)
        self._game: Game | None = None

    def reset(self, game: Game) -> State:
        if game is not self._game:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "game.tw-pddl"
                game.write(path)
                self._env.load(str(path))
            self._game = game
        return self._state(self._env.reset())

    def step(self, command: str) -> State:
        return self._state(self._env.step(command)[0])

    def close(self) -> None:
        pass

    def _state(self, state: Any) -> State:
        won = bool(state["won"])
        return State(state.feedback, tuple(state.admissible_commands), float(won), won)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--games", type=int, default=6, help="how many games are played")
    parser.add_argument("--steps", type=int, default=40, help="commands a game")
    parser.add_argument("--folder", type=Path, help="take game.tw-pddl files from here")
    parser.add_argument("--out", type=Path, default=Path("alfworld_engines.json"))
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        json.dump(measure(args.engine, choose_games(args), args.steps), sys.stdout)
        return

    results = {name: run_apart(name) for name in ENGINES}
    texts = {result.pop("texts") for result in results.values()}
    if len(texts) != 1:
        raise SystemExit("the engines gave different texts: these figures mean nothing")
    print_table(results)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {args.out}")


def run_apart(engine: str) -> dict[str, Any]:
    """This script's figures for one engine, from a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--engine", engine]
    output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    figures: dict[str, Any] = json.loads(output)
    return figures


def choose_games(args: argparse.Namespace) -> list[Game]:
    if args.folder is None:
        return [
            generate(seed, task_types=[TASK_TYPES[seed % len(TASK_TYPES)]])
            for seed in range(args.games)
        ]
    paths = sorted(args.folder.rglob("game.tw-pddl"))[: args.games]
    if not paths:
        raise SystemExit(f"no game.tw-pddl under {args.folder}")
    return [Game.read(path) for path in paths]


def measure(name: str, games: list[Game], num_steps: int) -> dict[str, Any]:
    start = time.perf_counter()
    engine = make_engine(name)
    construct_ms = (time.perf_counter() - start) * 1e3
    first_resets, later_resets, steps = [], [], []
    digest = hashlib.sha256()
    for game in games:
        first_resets.append(timed(engine.reset, game)[0])  # before wander() loads the game too
        # As shipped, every reset costs the same: two are enough.
        for _ in range(2 if name == "shipped" else GROUP_SIZE - 1):
            later_resets.append(timed(engine.reset, game)[0])
        for command in wander(game, num_steps):
            elapsed_ms, state = timed(engine.step, command)
            steps.append(elapsed_ms)
            digest.update(repr(state).encode())
    engine.close()
    first, later = statistics.fmean(first_resets), statistics.fmean(later_resets)
    figures = {
        "construct_ms": construct_ms,
        "first_reset_ms": first,
        "later_reset_ms": later,
        "group_reset_ms": (first + (GROUP_SIZE - 1) * later) / GROUP_SIZE,
        "step_ms": statistics.fmean(steps),
        "step_p95_ms": statistics.quantiles(steps, n=20)[-1],
        "num_games": len(games),
        "num_steps": len(steps),
        "texts": digest.hexdigest(),
    }
    if name == "native":
        figures["episode_kb"] = native_episode_kb(games)
    return figures


def make_engine(name: str) -> Engine:
    if name == "native":
        return NativeEngine()
    return TextWorldEngine() if name == "textworld" else ShippedEngine()


def wander(game: Game, num_steps: int) -> list[str]:
    """The game's plan, then commands by chance, a tenth of them impossible."""
    rng, engine = random.Random(game.name), NativeEngine()
    state = engine.reset(game)
    commands = list(game.walkthrough)[:num_steps]
    for command in commands:
        state = engine.step(command)
    while len(commands) < num_steps:
        local = [c for c in state.admissible if not c.startswith("go to")]
        command = rng.choice(local if rng.random() < 0.5 else state.admissible)
        commands.append("dance" if rng.random() < 0.1 else command)
        state = engine.step(commands[-1])
    return commands


def timed(call: Any, argument: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call(argument)
    return (time.perf_counter() - start) * 1e3, result


def native_episode_kb(games: list[Game]) -> float:
    """What one more episode of a loaded game takes, ten commands in."""
    plans = [wander(game, 10) for game in games]  # loads every game
    engines: list[NativeEngine] = []
    tracemalloc.start()
    for game, commands in zip(games * 5, plans * 5, strict=True):
        engine = NativeEngine()
        engine.reset(game)
        for command in commands:
            engine.step(command)
        engines.append(engine)
    taken, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return taken / len(engines) / 1024


def print_table(results: dict[str, dict[str, Any]]) -> None:
    rows = {
        "first reset of a game": "first_reset_ms",
        "later reset": "later_reset_ms",
        f"reset, mean of a group of {GROUP_SIZE}": "group_reset_ms",
        "step": "step_ms",
        "step, 95th percentile": "step_p95_ms",
    }
    print(f"{'ms':32}" + "".join(f"{name:>20}" for name in ENGINES))
    for label, key in rows.items():
        shipped = results["shipped"][key]
        cells = [f"{results[n][key]:.3f} ({shipped / results[n][key]:.0f}×)" for n in ENGINES]
        print(f"{label:32}" + "".join(f"{cell:>20}" for cell in cells))
    made = ", ".join(f"{name} {results[name]['construct_ms'] / 1e3:.2f} s" for name in ENGINES)
    print(f"making the first engine, imports included: {made}")
    print(f"memory of a native episode: {results['native']['episode_kb']:.0f} KB")


if __name__ == "__main__":
    main()
