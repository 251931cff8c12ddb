"""What environments over another package share: seeds, randomness and prints of their own."""

import contextlib
import random
import string
import sys
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces

Split = Literal["train", "heldout"]


class PackageEnv(gymnasium.Env[str, str]):
    """An environment over a package that draws from Python's and NumPy's global generators.

    Args:
        split: `train` or `heldout`.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (gymnasium's own type)

    def __init__(self, split: Split) -> None:
        if split not in ("train", "heldout"):
            raise ValueError(f"split={split!r} must be 'train' or 'heldout'")
        self.observation_space = spaces.Text(max_length=20_000, charset=string.printable)
        self.action_space = spaces.Text(max_length=20_000, min_length=0, charset=string.printable)
        self._split: Split = split
        self._own = (random.Random(0).getstate(), np.random.RandomState(0).get_state())

    def seed_of(self, seed: int | None) -> int:
        """The seed, or one that gymnasium's generator gives."""
        super().reset(seed=seed)
        return int(self.np_random.integers(2**31)) if seed is None else seed

    def game_of(self, seed: int | None) -> int:
        """The package's seed: even in training, odd where held out, so that they share none."""
        # NumPy's generator takes 32 bits.
        return (2 * self.seed_of(seed) + (self._split == "heldout")) % 2**32

    @contextlib.contextmanager
    def apart(self, seed: int | None = None) -> Iterator[None]:
        """While the package's code runs: it has generators of its own, and stdout is not its.

        They go on where this environment's last call left them, or from `seed`; the process's
        are as before afterwards, so that no other environment, and nothing else, is disturbed.
        """
        if seed is not None:
            self._own = (random.Random(seed).getstate(), np.random.RandomState(seed).get_state())
        before = random.getstate(), np.random.get_state()
        _set(self._own)
        try:
            with contextlib.redirect_stdout(sys.stderr):
                yield
        finally:
            self._own = random.getstate(), np.random.get_state()
            _set(before)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Around the import of such a package: their files have warnings that nobody here can mend."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _set(states: tuple[Any, Any]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
