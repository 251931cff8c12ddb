"""Environments of verifiers, which drive the policy themselves, in a Python that has the package.

    Verifiers ──(row, base URL, key)──→ verifiers_player.py: its rollout and rubric ──→ reward
                                              ⇅ its own OpenAI client
                                            Door

Another Python, because what verifiers and this package need can't be installed together.
"""

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from flash.errors import EnvFailure, ProcessFailure, first_error
from flash.types import Task

_PLAYER = Path(__file__).with_name("verifiers_player.py")
_GIVE_UP_S = 5.0


class Player(Protocol):
    """A process that answers calls: `flash.system.process.Child`."""

    @property
    def alive(self) -> bool: ...

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any: ...

    async def stop(self) -> None: ...

    def kill(self) -> None: ...


class Start(Protocol):
    """Starts one, with the run's environment variables and log."""

    async def __call__(self, command: Sequence[str], *, name: str, answers: Any) -> Player: ...


class _Json:
    """How the player's answers are read."""

    max_bytes = 1 << 20

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(tuple[int, bool, Any])

    def read(self, answer: bytes, methods: Mapping[int, str]) -> tuple[int, bool, Any]:
        return self._decoder.decode(answer)


class Verifiers:
    """Plays an environment of verifiers: `agent.run=flash.agents.verifiers:Verifiers`.

    One process plays all episodes side by side. What goes wrong in one of them fails it (env); the
    next one after the process was lost starts another. An episode whose reward is 1 or more is a
    success.

    Args:
        id: the environment, as `load_environment` takes it; an installed package.
        python: the interpreter that has verifiers and the environment.
        args: those of the environment's own `load_environment`.
        split: `train`, or `heldout`: rows of its evaluation set. The seed picks the row.
        load_timeout_s: for its packages and its data set.
    """

    def __init__(
        self,
        *,
        id: str,
        python: str,
        args: Mapping[str, Any] | None = None,
        split: Literal["train", "heldout"] = "train",
        load_timeout_s: float = 600.0,
    ) -> None:
        if not id:
            raise ValueError("id='' names no environment: write it as its package, vf-mine")
        if split not in ("train", "heldout"):
            raise ValueError(f"split={split!r} must be 'train' or 'heldout'")
        if not isinstance(args, Mapping | None):
            raise ValueError(f"args={args!r} must be the arguments by name: {{num_rows: 100}}")
        if not load_timeout_s > 0:
            raise ValueError(f"load_timeout_s={load_timeout_s!r} must be more than 0")
        if (found := shutil.which(os.path.expanduser(python))) is None:
            raise ValueError(
                f"python={python!r} is not there: make one with uv venv VENV; uv pip install "
                f"--python VENV verifiers; and name VENV/bin/python"
            )
        self._id = id
        options = json.dumps({"id": id, "args": dict(args or {}), "split": split})
        # -P: beside the player lie modules with the names of others' packages.
        self._command = (os.path.abspath(found), "-P", str(_PLAYER), options)
        self._load_timeout_s = load_timeout_s
        self._numbers = itertools.count()
        self._starting = asyncio.Lock()
        self._child: Player | None = None

    def check(self, env: Mapping[str, str]) -> None:
        """Loads the environment. ValueError says why it can't be."""
        try:
            done = subprocess.run(
                self._command,
                env=env,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self._load_timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ValueError(
                f"id={self._id!r} was not loaded within load_timeout_s={self._load_timeout_s:g}: "
                f"raise it"
            ) from error
        if done.returncode:
            raise ValueError(done.stdout or done.stderr[-2000:])

    @contextlib.asynccontextmanager
    async def opened(self, start: Start) -> AsyncIterator["Verifiers"]:
        self._start = start
        with first_error():
            async with asyncio.TaskGroup() as self._tasks:
                await self._loaded()
                try:
                    yield self
                finally:
                    if self._child is not None:
                        await self._child.stop()

    async def __call__(self, *, task: Task, base_url: str, api_key: str) -> dict[str, Any]:
        """One episode. EnvFailure for whatever goes wrong in the environment or its process."""
        number = next(self._numbers)
        child = await self._loaded()
        try:
            reward = await child.call("play", number, task.seed, base_url, api_key)
        except ProcessFailure as failure:
            raise EnvFailure(f"{self._id}: {failure}") from failure
        except asyncio.CancelledError:
            self._tasks.create_task(_give_up(child, number), name=f"give up {self._id} {number}")
            raise
        return {"reward": reward, "success": reward >= 1.0}

    async def _loaded(self) -> Player:
        """The process, which has loaded the environment."""
        async with self._starting:
            if self._child is None or not self._child.alive:
                child = await self._start(
                    self._command, name=f"verifiers {self._id}", answers=_Json()
                )
                try:
                    await child.call("load", timeout_s=self._load_timeout_s)
                except BaseException as error:
                    child.kill()
                    await child.stop()
                    if isinstance(error, ProcessFailure | TimeoutError):
                        raise EnvFailure(f"{self._id} can't be loaded: {error}") from error
                    raise
                self._child = child
            return self._child


async def _give_up(child: Player, number: int) -> None:
    """Ends one episode; and all of them, where a tool or a reward function blocks the process."""
    try:
        await child.call("give_up", number, timeout_s=_GIVE_UP_S)
    except TimeoutError:
        child.kill()
    except ProcessFailure:
        pass  # it ended with its process
