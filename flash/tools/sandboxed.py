"""Functions as tools that run in sandboxes."""

import asyncio
import contextlib
import importlib
import json
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec

from flash.errors import EnvFailure
from flash.sandbox import Kind, Outcome, Sandbox, open_sandbox
from flash.tools.functions import FIELD, Function, schema_of
from flash.tools.tool import Schema, ToolError

_INSIDE = Path(__file__).with_name("inside.py")
_ANSWER_BYTES = 16 << 20
_START_TIMEOUT_S = 60.0  # for the interpreter, and what a function's module imports


@dataclass(frozen=True, slots=True, kw_only=True)
class _Function:
    """A function by its name, `module:name`; the folder that its module is imported from, and the
    file or package of it that is seen in a sandbox."""

    name: str
    schema: Schema
    root: Path
    seen: Path


class SandboxedFunctions:
    """Functions of the user's, each call of one in a Python of its own, in an episode's sandbox.

    They see the module or the whole package that they are in, and this Python's packages.
    """

    def __init__(self, kind: Kind, functions: Mapping[str, Function]) -> None:
        self._kind = kind
        self._functions = [_found(name, function) for name, function in functions.items()]

    @contextlib.asynccontextmanager
    async def of_episode(self) -> "AsyncIterator[list[SandboxedTool]]":
        """Tools that share a sandbox, which is opened when the first of them is called."""
        async with _Later(self._open) as sandbox:
            yield [SandboxedTool(function, sandbox) for function in self._functions]

    async def check(self) -> None:
        """ValueError for a function that can't be had in a sandbox."""
        async with self._open() as sandbox:
            for function in self._functions:
                outcome = await _call(sandbox, function, timeout_s=_START_TIMEOUT_S)
                if outcome.returncode != 0:
                    raise ValueError(
                        f"{FIELD}={function.name!r} can't be imported in a sandbox, which sees of "
                        f"your code {function.seen} alone: {_last_line(outcome)}: put what it "
                        f"needs there too, or leave agent.sandbox out"
                    )

    def _open(self) -> Sandbox:
        seen = [function.seen for function in self._functions]
        return open_sandbox(self._kind, readable=[*seen, _INSIDE])


class SandboxedTool:
    """One of them."""

    def __init__(self, function: _Function, sandbox: "_Later") -> None:
        self.schema = function.schema
        self._function = function
        self._sandbox = sandbox

    async def call(self, arguments: Mapping[str, Any], *, timeout_s: float) -> str:
        sandbox = await self._sandbox.opened()
        outcome = await _call(sandbox, self._function, timeout_s=timeout_s, arguments=arguments)
        if outcome.ended == "deadline":
            raise TimeoutError
        if outcome.ended == "memory":
            raise ToolError(f"it needed more than {sandbox.limits.memory_mb} MB of memory")
        if outcome.cut:
            raise ToolError(f"it answered more than {_ANSWER_BYTES} bytes")
        try:
            returned, text = msgspec.json.decode(outcome.stdout, type=tuple[bool, str])
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise EnvFailure(
                f"tool {self._function.name!r} did not answer, and ended with exit code "
                f"{outcome.returncode}: {_last_line(outcome)}"
            ) from error
        if not returned:
            raise ToolError(text)
        return text


class _Later:
    """A sandbox that is opened when it is needed, and closed at the end."""

    def __init__(self, make: Callable[[], Sandbox]) -> None:
        self._make = make
        self._opening = asyncio.Lock()  # held while it is opened
        self._sandbox: Sandbox | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._sandbox is not None:
            await self._sandbox.aclose()

    async def opened(self) -> Sandbox:
        async with self._opening:
            if self._sandbox is None:
                self._sandbox = await self._make().__aenter__()
            return self._sandbox


async def _call(
    sandbox: Sandbox,
    function: _Function,
    *,
    timeout_s: float,
    arguments: Mapping[str, Any] | None = None,
) -> Outcome:
    """How it went; without arguments the function is only looked for."""
    request: dict[str, Any] = {"name": function.name, "path": [str(function.root)]}
    if arguments is not None:
        request["arguments"] = dict(arguments)
    return await sandbox.run(
        [sys.executable, "-I", str(_INSIDE)],
        stdin=json.dumps(request).encode(),
        seconds=timeout_s,
        output_bytes=_ANSWER_BYTES,
    )


def _found(name: str, function: Function) -> _Function:
    module = name.partition(":")[0]
    given = importlib.import_module(module).__file__
    if given is None:
        raise ValueError(
            f"{FIELD}={name!r} is in no file, which agent.sandbox needs: put it in one"
        )
    file = Path(given).absolute()
    root = file.parents[module.count(".") + (file.name == "__init__.py")]
    seen = root / file.relative_to(root).parts[0]
    return _Function(name=name, schema=schema_of(name, function), root=root, seen=seen)


def _last_line(outcome: Outcome) -> str:
    lines = outcome.stderr.decode(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it said nothing")
