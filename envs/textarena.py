"""TextArena's games for one player."""

import functools
from typing import Any

from .of_package import PackageEnv, Split, importing

with importing():
    import textarena
    from textarena.core import ObservationType
    from textarena.envs.registration import ENV_REGISTRY
    from textarena.wrappers import ActionFormattingWrapper


class TextArenaEnv(PackageEnv):
    """A game of TextArena; an observation is what the game said since the last action.

    The reward comes at the end, from the game: mostly between 0 and 1, or -1 after a wrong move.

    Args:
        id: the game, for example `TowerOfHanoi-v0`.
        config: its constructor's arguments, in the place of the registered ones.
        split: `train` or `heldout`; each has seeds of its own.
    """

    # Not "deterministic": nothing in the package promises it.

    def __init__(
        self, *, id: str, config: dict[str, Any] | None = None, split: Split = "train"
    ) -> None:
        super().__init__(split)
        if f"{id}-raw" not in ENV_REGISTRY:
            raise ValueError(f"id={id!r} is not one of textarena's {len(ENV_REGISTRY)} games")
        with self.apart(), importing():
            _check(id)
            self._game = _made(id, config or {})

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        game_seed = self.game_of(seed)
        with self.apart(game_seed):
            self._game.reset(num_players=1, seed=game_seed)
            return self._said(), {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        with self.apart():
            done, _ = self._game.step(action)
            text = self._said()
            if not done:
                return text, 0.0, False, False, {}
            rewards, about = self._game.close()
        reward = float(rewards[0])
        return text, reward, True, False, {**about[0], "success": reward >= 1.0}

    def _said(self) -> str:
        _, messages = self._game.get_observation()
        return "\n".join(
            text for _, text, kind in messages if kind is not ObservationType.PLAYER_ACTION
        )


@functools.cache
def _check(id: str) -> None:
    """ValueError if that game can't be played here by one player; found out by a trial."""
    several = f"id={id!r} is for several players: name a game for one"
    try:
        game = _made(id, {})
        game.reset(num_players=1, seed=0)
    except LookupError as error:
        raise ValueError(
            f"id={id!r} needs word lists that are not here: run `python -m nltk.downloader "
            f"words averaged_perceptron_tagger_eng`"
        ) from error
    except SyntaxError as error:
        raise ValueError(
            f"id={id!r} can't be played: {error.filename}, line {error.lineno} of textarena "
            f"is no Python that this version reads: {error.msg}: take another game or Python"
        ) from error
    except (AssertionError, ValueError) as error:
        if "player" in str(error):
            raise ValueError(several) from error
        raise
    if not isinstance(game.state, textarena.SinglePlayerState):
        raise ValueError(several)


def _made(id: str, config: dict[str, Any]) -> Any:
    return ActionFormattingWrapper(textarena.make(f"{id}-raw", **config))
