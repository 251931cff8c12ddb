"""TextArena's games: for one player an environment, for several a table at which they sit."""

import functools
from typing import Any

from .of_package import PackageEnv, Split, importing

with importing():
    import textarena
    from textarena.core import GAME_ID, ObservationType
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
        with self.apart(), importing():
            _check(id, 1)
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
        return _heard(self._game)[1]


class TextArenaTable:
    """A game of TextArena for several players, who take turns at it as the game says.

    Args:
        id: the game, for example `TicTacToe-v0`.
        players: how many sit at it.
        config, split: as for `TextArenaEnv`.
    """

    def __init__(
        self, *, id: str, players: int, config: dict[str, Any] | None = None, split: Split = "train"
    ) -> None:
        self._package = PackageEnv(split)
        self._players = players
        with self._package.apart(), importing():
            _check(id, players)
            self._game = _made(id, config or {})

    def reset(self, *, seed: int) -> None:
        """Begins the game of that seed."""
        game_seed = self._package.game_of(seed)
        with self._package.apart(game_seed):
            self._game.reset(num_players=self._players, seed=game_seed)

    def turn(self) -> tuple[int, str]:
        """Whose turn it is, by seat from 0, and what that one has heard since the last."""
        with self._package.apart():
            return _heard(self._game)

    def step(self, action: str) -> bool:
        """What the one whose turn it is does; whether the game is over."""
        with self._package.apart():
            done, _ = self._game.step(action)
        return bool(done)

    def rewards(self) -> list[float]:
        """Of a game that is over, by seat."""
        rewards, _ = self._game.close()
        return [float(rewards[seat]) for seat in range(self._players)]


def _heard(game: Any) -> tuple[int, str]:
    """By whose turn it is: what others said and the game told, not what that one did."""
    player, messages = game.get_observation()
    return player, "\n".join(
        text
        for sender, text, kind in messages
        # An action of the only player is told as the game's own words.
        if kind is not ObservationType.PLAYER_ACTION or sender not in (player, GAME_ID)
    )


@functools.cache
def _check(id: str, players: int) -> None:
    """ValueError if that game can't be played here by so many; found out by a trial."""
    if f"{id}-raw" not in ENV_REGISTRY:
        raise ValueError(f"id={id!r} is not one of textarena's {len(ENV_REGISTRY)} games")
    wrong = f"id={id!r} is not for {players} players: name another game, or as many roles"
    if players == 1:
        wrong = f"id={id!r} is for several players: name a game for one, or let roles play it"
    try:
        game = _made(id, {})
        game.reset(num_players=players, seed=0)
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
            raise ValueError(wrong) from error
        raise
    if isinstance(game.state, textarena.SinglePlayerState) != (players == 1):
        raise ValueError(wrong)


def _made(id: str, config: dict[str, Any]) -> Any:
    return ActionFormattingWrapper(textarena.make(f"{id}-raw", **config))
