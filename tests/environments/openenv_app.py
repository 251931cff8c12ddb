"""Two apps on OpenEnv's own servers, for a Python that has openenv-core: run by uvicorn.

`/echo` is the environment that `openenv init` makes, unchanged, of which there may be one session;
`/numbers` is one with seeds, an end and failures, of which there may be many.
"""

import random
from typing import Any

from fastapi import FastAPI
from openenv.core.env_server.http_server import create_fastapi_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State
from server.app import app as echo


class Guess(Action):
    number: int


class Told(Observation):
    text: str
    most: int = 9


class Numbers(Environment[Guess, Told, State]):
    """A number from 0 to 9 is to be guessed; what is below 0 breaks it."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, most: int = 9, **_: Any) -> Told:
        self._most = most
        self._number = random.Random(seed).randint(0, most)
        self._state = State()
        return Told(text=f"task {seed}: guess a number up to {most}", most=most)

    def step(self, action: Guess, **_: Any) -> Told:
        if action.number < 0:
            raise ArithmeticError("below 0")
        self._state.step_count += 1
        right = action.number == self._number
        said = f"{self._state.step_count}: {'right' if right else 'wrong'}"
        return Told(
            text=said,
            most=self._most,
            done=right,
            reward=1.0 if right else None,
            metadata={"number": self._number},
        )

    @property
    def state(self) -> State:
        return self._state


app = FastAPI()
app.mount("/echo", echo)
app.mount("/numbers", create_fastapi_app(Numbers, Guess, Told, max_concurrent_envs=100))
