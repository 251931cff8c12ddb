"""gem's environments, from its own registry."""

from typing import Any

from .of_package import PackageEnv, Split, importing

with importing():
    import gem
    from gem.envs.registration import ENV_REGISTRY

_GAMES = "game:"


class GemEnv(PackageEnv):
    """A game of gem; what it suggests to say next ends each observation.

    Args:
        id: the environment, for example `game:GuessTheNumber-v0`.
        config: its constructor's arguments, in the place of the registered ones.
        split: `train` or `heldout`; each has seeds of its own.
    """

    # Not "deterministic": nothing in the package promises it.

    def __init__(
        self, *, id: str, config: dict[str, Any] | None = None, split: Split = "train"
    ) -> None:
        super().__init__(split)
        if id not in ENV_REGISTRY:
            raise ValueError(f"id={id!r} is not one of gem's {len(ENV_REGISTRY)} environments")
        if not id.startswith(_GAMES):
            raise ValueError(
                f"id={id!r} goes through its rows in order, whatever the seed, so that a group's "
                f"episodes would differ: name one of gem's games ({_GAMES}…), or use env.name="
                f"reasoning_gym or questions for such rows"
            )
        with self.apart(), importing():
            try:
                self._env = gem.make(id, **(config or {}))
            except LookupError as error:
                raise ValueError(
                    f"id={id!r} needs word lists that are not here: run `python -m "
                    f"nltk.downloader words averaged_perceptron_tagger_eng`"
                ) from error

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        game_seed = self.game_of(seed)
        with self.apart(game_seed):
            text, info = self._env.reset(seed=game_seed)
        return _with_suffix(text, info), info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        with self.apart():
            text, reward, terminated, truncated, info = self._env.step(action)
        if terminated or truncated:
            return text, reward, terminated, truncated, {**info, "success": reward >= 1.0}
        return _with_suffix(text, info), reward, terminated, truncated, info


def _with_suffix(text: str, info: dict[str, Any]) -> str:
    """As gem's own wrappers that join observations do."""
    return f"{text}\n{info['suffix']}" if info.get("suffix") else text
