"""What a tool is, and what becomes of calls: checked, run side by side, told as texts."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, runtime_checkable

import jsonschema

from flash.answers import shown
from flash.errors import EnvFailure, first_error, one_line
from flash.types import PromptStyle, ToolUse

Schema = Mapping[str, Any]
"""As chat templates take it: `{"type": "function", "function": {"name", "parameters", …}}`."""

UNKNOWN = "_unknown"
"""In what is told of calls: tools that are not there."""

PROBE: Schema = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "?",
        "parameters": {
            "type": "object",
            "properties": {"argument": {"type": "string", "description": "?"}},
            "required": ["argument"],
        },
    },
}
"""A tool that nobody runs, to try how a model calls one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """As a policy said it; `arguments` should be a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a policy said: an answer, or calls; `wrong` is why calls can't be read."""

    text: str
    calls: Sequence[ToolCall] = ()
    wrong: str = ""


@runtime_checkable
class CallingStyle(PromptStyle, Protocol):
    """A prompt style whose policy is shown tools, and calls them."""

    def calling(self, schemas: Sequence[Schema]) -> Self:
        """The same style with these tools, of which `read` and `results` know. ValueError where
        the model does not call tools. Reads files."""
        ...

    def read(self, prompt: Sequence[int], sampled: Sequence[int]) -> Said:
        """What was sampled after `prompt`; in `text` the action, if nothing was called."""
        ...

    def results(
        self, calls: Sequence[ToolCall], results: Sequence[str], sampled: Sequence[int]
    ) -> list[int]:
        """Tokens between what was sampled, with those calls, and the next words."""
        ...


class ToolError(Exception):
    """A call went wrong in a way that the policy is told, and can learn from."""


class Tool(Protocol):
    """Something that a policy can call; where it runs is its own business.

    `call` raises ToolError for what the policy is told, TimeoutError past the deadline, and
    EnvFailure, which ends the episode, where what it runs in failed.
    """

    @property
    def schema(self) -> Schema: ...

    async def call(self, arguments: Mapping[str, Any], *, timeout_s: float) -> str: ...


def name_of(schema: Schema) -> str:
    return str(schema["function"]["name"])


class Toolbox:
    """The tools of one episode.

    Args:
        timeout_s: for one call.
        max_chars: of one result; what is longer is cut, which the policy is told.
        uses: by tool, is told of each call; of tools that are not there under one name.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        *,
        timeout_s: float,
        max_chars: int,
        uses: dict[str, ToolUse] | None = None,
    ) -> None:
        self._uses = {} if uses is None else uses
        self._tools = {name_of(tool.schema): tool for tool in tools}
        self._timeout_s = timeout_s
        self._max_chars = max_chars

    async def answer(self, calls: Sequence[ToolCall]) -> list[str]:
        """The results of calls that run side by side, in their order; errors are results too.

        EnvFailure where a tool itself failed, or answered what is no Unicode.
        """
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self._answer(call), name=f"tool {call.name}")
                    for call in calls
                ]
        return [task.result() for task in running]

    async def _answer(self, call: ToolCall) -> str:
        clock = asyncio.get_running_loop().time
        use = self._uses.setdefault(call.name if call.name in self._tools else UNKNOWN, ToolUse())
        use.calls += 1
        began = clock()
        try:
            text = await self._call(call)
        except ToolError as error:
            use.errors += 1
            text = f"Error: {error}".encode(errors="replace").decode()
        except TimeoutError:
            use.late += 1
            text = f"Error: {call.name} took longer than {self._timeout_s:g} s"
        finally:
            use.seconds += clock() - began
        try:
            text.encode()
        except UnicodeEncodeError as error:
            near = text[max(0, error.start - 10) : error.start + 10]
            raise EnvFailure(
                f"tool {call.name!r} answered {shown(near)}: it must be a text that is Unicode: "
                f"decode bytes with errors='replace'"
            ) from error
        left_out = len(text) - self._max_chars
        return f"{text[:-left_out]}… ({left_out} more characters)" if left_out > 0 else text

    async def _call(self, call: ToolCall) -> str:
        tool = self._tools.get(call.name)
        if tool is None:
            known = ", ".join(self._tools)
            raise ToolError(f"there is no tool {call.name!r}; there are {known}")
        try:
            arguments = json.loads(call.arguments)
        except ValueError as error:
            raise ToolError(f"the arguments are no JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise ToolError("the arguments must be a JSON object")
        parameters = tool.schema["function"].get("parameters", {})
        checker = jsonschema.Draft202012Validator(parameters)
        try:
            wrong = jsonschema.exceptions.best_match(checker.iter_errors(arguments))
        except Exception as error:  # the boundary to a server's schema, which may be none
            raise EnvFailure(
                f"tool {call.name!r} has a schema that nothing can be checked against: "
                f"{one_line(error)}"
            ) from error
        if wrong:
            where = "".join(f" of {part!r}" for part in reversed(wrong.absolute_path))
            raise ToolError(f"wrong arguments{where}: {wrong.message}")
        return await tool.call(arguments, timeout_s=self._timeout_s)
