"""The real ALFWorld engine, TextWorld's, several times faster and with the same answers.

As shipped, a reset grounds the PDDL problem four times, twice of them for a planner, and every
step parses the same text templates again and copies their contexts deeply. Here grounding and
parsing are remembered, contexts are copied as deep as they are written to, and the planner is
left out. `_patch` is the one place where foreign code is changed, when the first engine is made.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

from .engine import State
from .game import Game

_log = logging.getLogger(__name__)

_PATCHED_VERSION = "1.7.0"
# A grounded problem takes some megabytes; an environment host seldom plays more games at a time.
_MAX_GROUNDED = 16


class TextWorldEngine:
    """Plays games with the alfworld and textworld packages; see `Engine` for the calls.

    Not thread-safe: TextWorld's parsers are global, and grounding swaps `sys.argv` and
    `sys.stdout`. Several engines in a process work if one call is made at a time, so run them
    in environment host processes. The alfworld package creates `~/.cache/alfworld` when it is
    imported, unless ALFWORLD_DATA names another folder. Raises ImportError without the packages
    (`pip install "flash-rl[alfworld]"`). With another textworld than 1.7.0 it runs as shipped,
    ten times slower, and logs a warning.
    """

    def __init__(self) -> None:
        patched = _patch()
        if _idle:
            self._env = _idle.pop()
        else:
            textworld = importlib.import_module("textworld")
            infos = textworld.EnvInfos(feedback=True, won=True, admissible_commands=True)
            pddl = importlib.import_module("textworld.envs.pddl").PddlEnv(infos)
            if patched:
                pddl.downward_lib = _WithoutPlanner(pddl.downward_lib)
            alfworld = importlib.import_module("alfworld.agents.environment.alfred_tw_env")
            self._env = alfworld.AlfredDemangler(pddl, shuffle=False)
        self._game: Game | None = None

    def reset(self, game: Game) -> State:
        """Starts the game; the first reset of a game grounds it and takes longest."""
        if self._game != game:
            self._game = None
            self._env.load(game.record())
            self._game = game
        return _state(self._env.reset())

    def step(self, command: str) -> State:
        assert self._game is not None, "step before reset"
        state, _, _ = self._env.step(command)
        return _state(state)

    def close(self) -> None:
        """Leaves what the engine holds to the next engine of this process."""
        self._game = None
        _idle.append(self._env)


# Each environment has its own copy of fast_downward's library, and unloading one has crashed the
# process now and then; so they are handed on, never freed.
_idle: list[Any] = []


def _state(state: Any) -> State:
    won = bool(state["won"])
    return State(state.feedback, tuple(state.admissible_commands), float(won), won)


class _WithoutPlanner:
    """fast_downward's library, deaf to the problem that only its planner would read."""

    def __init__(self, library: Any) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def load_sas_replan(self, sas: bytes) -> None:
        """Nothing: no plan is ever asked for."""


@lru_cache(maxsize=1)
def _patch() -> bool:
    """Changes textworld's modules once per process; False if this version is left as shipped."""
    version = importlib.metadata.version("textworld")
    if version != _PATCHED_VERSION:
        _log.warning(
            "textworld %s runs as shipped: the faster paths are known to be right for %s only",
            version,
            _PATCHED_VERSION,
        )
        return False
    fast_downward: Any = importlib.import_module("fast_downward")
    textworld_logic: Any = importlib.import_module("textworld.logic")
    logic: Any = importlib.import_module("textworld.envs.pddl.logic")
    textgen: Any = importlib.import_module("textworld.envs.pddl.textgen")

    fast_downward.pddl2sas = _ground_once(fast_downward.pddl2sas)
    logic._parse_and_convert = lru_cache(maxsize=64)(logic._parse_and_convert)
    parse = lru_cache(maxsize=4096)(textgen._parse_and_convert)
    textgen._parse_and_convert = lambda *args, **kwargs: _copied(parse(*args, **kwargs))
    textgen.deepcopy = _copied
    textgen.Rule = _Queries(textgen.Rule)
    # Sorting calls Proposition.__lt__, in Python, for every comparison: half the time of a step.
    textworld_logic.sorted = _sorted_by_key
    textgen.EvalSymbol.derive = _derive_expression(textgen.TerminalSymbol)
    return True


def _ground_once(pddl2sas: Callable[..., Any]) -> Callable[..., Any]:
    """fast_downward's grounding, remembered, with `sys.argv` as it was before."""

    @lru_cache(maxsize=_MAX_GROUNDED)
    def ground(domain: str, problem: str) -> Any:
        argv = sys.argv
        try:
            return pddl2sas(domain, problem)
        finally:
            sys.argv = argv

    def grounded(domain: str, problem: str, verbose: bool = False, optimize: bool = False) -> Any:
        # The optimized grounding is the planner's: any stand-in will do.
        return ground(domain, problem)

    return grounded


def _copied(value: Any) -> Any:
    """A copy as deep as textgen writes: lists of symbols, one symbol, or a context's tables."""
    if isinstance(value, list):
        return [copy.copy(item) for item in value]
    return copy.copy(value)


def _sorted_by_key(items: Iterable[Any]) -> list[Any]:
    """`sorted` in the order of `textworld.logic`'s signatures and propositions."""
    items = list(items)
    if len(items) < 2 or not hasattr(items[0], "arguments"):
        return sorted(items)
    return sorted(items, key=_proposition_key)


def _proposition_key(proposition: Any) -> tuple[str, list[tuple[str, str]]]:
    return proposition.name, [(v.name, v.type) for v in proposition.arguments]


class _Queries:
    """`textworld.logic.Rule` as textgen uses it, with each query parsed once."""

    def __init__(self, rule: Any) -> None:
        self.parse_conjunctive_query = lru_cache(maxsize=4096)(rule.parse_conjunctive_query)


def _derive_expression(terminal: Callable[[Any], Any]) -> Callable[..., list[Any]]:
    """`EvalSymbol.derive` with compiled expressions.

    The original writes variables into `locals()`, which Python 3.13 no longer allows.
    """

    @lru_cache(maxsize=4096)
    def compiled(expression: str) -> Any:
        return compile(expression.strip(), "<game grammar>", "eval")

    def derive(self: Any, context: Mapping[str, Any] | None = None) -> list[Any]:
        variables = (context or self.context)["variables"]
        return [terminal(eval(compiled(self.expression), {}, dict(variables)))]

    return derive
