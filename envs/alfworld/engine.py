"""What an ALFWorld engine is: it plays one game at a time, text in and text out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .game import Game


@dataclass(frozen=True, slots=True)
class State:
    """What the player knows after a reset or a command.

    `admissible` is sorted and without duplicates; any other command gives "Nothing happens.".
    `reward` is 1.0 in every state that fulfils the goal and 0.0 in every other.
    """

    text: str
    admissible: tuple[str, ...]
    reward: float
    won: bool

    @property
    def done(self) -> bool:
        """Whether the episode is over. No ALFWorld game is ever lost: it ends when it is won."""
        return self.won


class Engine(Protocol):
    """Plays games. Every engine gives the same states for the same game and commands.

    A step before the first reset is an error of the caller. After the end, more commands are
    played on as the real engine does, so that the caller alone decides when to stop.
    """

    def reset(self, game: Game) -> State:
        """Starts the game, dropping the one in progress."""
        ...

    def step(self, command: str) -> State:
        """Plays one command; surrounding white space is ignored, case is not."""
        ...

    def close(self) -> None:
        """Frees what the engine holds; it is not used afterwards."""
        ...
