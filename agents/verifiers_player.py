"""Plays episodes of one environment of verifiers, many at a time, in a Python that has it.

`verifiers.py` starts it there, so it imports nothing of `flash`. Its argument are options, in JSON.
By itself it loads the environment, says on stdout what is wrong, if anything is, and ends.
"""

import asyncio
import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import socket
import struct
import sys
import traceback
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

_LENGTH = struct.Struct("!Q")
_MODEL = "policy"
_ERROR_CHARS = 20_000


class Refused(Exception):
    """Options that can't be; says which, and the remedy."""


class Played(Protocol):
    """An environment of either API. `rows`: how many tasks it has."""

    rows: int

    def serving(self) -> contextlib.AbstractAsyncContextManager[None]:
        """While episodes are played."""
        ...

    async def play(self, row: int, base_url: str, api_key: str) -> tuple[float, Mapping[str, Any]]:
        """The reward of an episode, and what each function of its rubric gave."""
        ...


class Classic:
    """What a package's `load_environment` makes: verifiers before 0.4."""

    def __init__(self, module: Any, id: str, args: Mapping[str, Any], split: str) -> None:
        verifiers = importlib.import_module("verifiers")
        if not hasattr(verifiers, "load_environment"):
            raise Refused(
                f"id={id!r} is of verifiers before 0.4, and {sys.executable} has "
                f"{verifiers.__version__}: install 'verifiers<0.4' there"
            )
        try:
            inspect.signature(module.load_environment).bind(**args)
        except TypeError as error:
            raise Refused(f"args={args!r} of id={id!r}: {error}") from error
        self._environment = verifiers.load_environment(id, **args)
        self._rows = self._rows_of(id, split)
        self.rows = len(self._rows)
        rubric = self._environment.rubric
        if of_group := [f.__name__ for f in rubric._get_reward_funcs() if rubric._is_group_func(f)]:
            raise Refused(
                f"id={id!r} rewards by comparing episodes of a group ({', '.join(of_group)}), and "
                f"here each is rewarded by itself: choose another"
            )
        # Clients of its own are what takes OpenAI's from 0.1.11 on.
        of_kind = {"completion": "OpenAICompletionsClient"}.get(
            self._environment.message_type, "OpenAIChatCompletionsClient"
        )
        self._client = getattr(verifiers, of_kind, lambda client: client)

    def _rows_of(self, id: str, split: str) -> Any:
        if split == "heldout":
            rows = self._environment.get_eval_dataset()
            if self._environment.eval_dataset is None:
                raise Refused(
                    f"id={id!r} has no evaluation set, so that no tasks are held out: "
                    "write --env.eval_options '{}'"
                )
            return rows
        try:
            return self._environment.get_dataset()
        except ValueError as error:
            raise Refused(f"id={id!r} has no training set ({error}): choose another") from error

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        from openai import DefaultAsyncHttpxClient  # noqa: PLC0415

        async with DefaultAsyncHttpxClient(timeout=None) as self._http:
            yield

    async def play(self, row: int, base_url: str, api_key: str) -> tuple[float, Mapping[str, Any]]:
        from openai import AsyncOpenAI  # noqa: PLC0415

        client = AsyncOpenAI(
            base_url=base_url, api_key=api_key, http_client=self._http, max_retries=0
        )
        output = await self._environment.run_rollout(
            self._rows[row], self._client(client), _MODEL, dict(self._environment.sampling_args)
        )
        if error := output.get("error"):  # verifiers gives a reward for it, too
            raise RuntimeError(f"row {row}: {error['error_chain_repr']}")
        return output["reward"], output["metrics"]


def load(*, id: str, args: Mapping[str, Any], split: str) -> Played:
    """The environment. Refused if it can't be had."""
    here = sys.executable
    if importlib.util.find_spec("verifiers") is None:
        raise Refused(
            f"python={here!r} has no verifiers: run uv pip install --python {here} verifiers"
        )
    name = id.rpartition("/")[2].partition("@")[0].replace("-", "_")
    if importlib.util.find_spec(name) is None:
        raise Refused(
            f"id={id!r}: {here} has no package {name}: install the environment there, with uv pip "
            f"install --python {here}, or with prime env install"
        )
    try:
        return Classic(importlib.import_module(name), id, args, split)
    except Refused:
        raise
    except Exception as error:  # the boundary to the environment's code
        traceback.print_exc()
        raise Refused(f"id={id!r} with args={args!r}: {type(error).__name__}: {error}") from error


async def serve(environment: Played, descriptor: int) -> None:
    """Answers the calls of `verifiers.py` until it closes the socket."""
    reader, writer = await asyncio.open_unix_connection(sock=socket.socket(fileno=descriptor))
    episodes: dict[int, asyncio.Task[None]] = {}

    def answer(call: int, *, ok: bool, told: Any) -> None:
        payload = json.dumps([call, ok, told], allow_nan=False).encode()
        writer.write(_LENGTH.pack(len(payload)) + payload)

    async def play(call: int, number: int, seed: int, base_url: str, api_key: str) -> None:
        try:
            row = seed % environment.rows
            reward, metrics = await environment.play(row, base_url, api_key)
            answer(call, ok=True, told=float(reward))
            scored = {"seed": seed, "reward": float(reward), "metrics": dict(metrics)}
            print(json.dumps(scored, default=repr), file=sys.stderr, flush=True)
        except Exception as error:  # the boundary to the environment's code
            traceback.print_exc()
            told = f"{type(error).__name__}: {error}"[-_ERROR_CHARS:]
            answer(call, ok=False, told=told.encode(errors="replace").decode())
        finally:
            del episodes[number]

    async def give_up(call: int, number: int) -> None:
        if number in episodes:
            episodes[number].cancel()
            await asyncio.wait([episodes[number]])
        answer(call, ok=True, told=None)

    async with environment.serving(), asyncio.TaskGroup() as tasks:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                call, method, args = pickle.loads(await reader.readexactly(length))
                if method == "play":
                    episodes[args[0]] = tasks.create_task(play(call, *args))
                elif method == "give_up":
                    tasks.create_task(give_up(call, *args))
                else:
                    answer(call, ok=True, told=None)
        for episode in episodes.values():
            episode.cancel()


def main() -> None:
    descriptor = os.environ.pop("FLASH_CHILD_FD", None)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            environment = load(**json.loads(sys.argv[1]))
            refused = ""
        except Refused as error:
            refused = str(error)
    if refused:
        sys.exit(print(refused) or 1)
    if descriptor is not None:
        asyncio.run(serve(environment, int(descriptor)))


if __name__ == "__main__":
    main()
