"""Functions as tools: coroutines in the event loop, all others in processes."""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from flash import registry
from flash.answers import failing_as, shown
from flash.deadline import Deadline
from flash.errors import EnvFailure, one_line
from flash.system.pool import ProcessPool
from flash.tools.tool import Schema, ToolError, name_of

FIELD = "agent.tools"
Function = Callable[..., Any]


def function_of(name: str) -> Function:
    """The function `module:function`. ValueError if there is none, or if it is no tool."""
    function: Function = registry.function(name, FIELD)
    schema_of(name, function)
    return function


def schema_of(name: str, function: Function, *, field: str = FIELD) -> Schema:
    """Of its signature and docstring; ValueError says what they lack."""
    # Seconds to import.
    from transformers.utils.chat_template_utils import (  # noqa: PLC0415
        DocstringParsingException,
        TypeHintParsingException,
        get_json_schema,
    )

    try:
        schema: dict[str, Any] = get_json_schema(function)
    except (DocstringParsingException, TypeHintParsingException, ValueError) as error:
        raise ValueError(
            f"{field}={name!r} does not say what it takes: {' '.join(str(error).split())}: give "
            f"each argument a type, and a line in the docstring's 'Args:'"
        ) from error
    schema["function"].pop("return", None)  # templates show it to the model as one more argument
    schema["function"]["parameters"]["additionalProperties"] = False
    return schema


def is_coroutine(function: Function) -> bool:
    return inspect.iscoroutinefunction(function)


def as_text(name: str, answer: object) -> str:
    """What a function returned, as the policy is told it: texts as they are, the rest as JSON."""
    if isinstance(answer, str):
        return str.__str__(answer)
    try:
        return msgspec.json.encode(answer).decode()
    except Exception as error:  # the boundary: an object's own attributes may raise anything
        raise EnvFailure(
            f"tool {name!r} answered {shown(answer)}: it must be a text or plain data"
        ) from error


class CoroutineTool:
    """A coroutine function of the user's, in the event loop: it must not block."""

    def __init__(self, name: str, function: Callable[..., Awaitable[Any]]) -> None:
        self.schema = schema_of(name, function)
        self._function = function

    async def call(self, arguments: Mapping[str, Any], *, timeout_s: float) -> str:
        name = name_of(self.schema)
        with Deadline(timeout_s), failing_as(EnvFailure, f"tool {name!r}"):
            answer, error = await self._returned(arguments)
        if error is not None:
            raise ToolError(one_line(error)) from error
        return as_text(name, answer)

    async def _returned(self, arguments: Mapping[str, Any]) -> tuple[Any, Exception | None]:
        try:
            return await self._function(**arguments), None
        except Exception as error:  # the boundary to the user's function; the policy is told
            return None, error


class ProcessTool:
    """A function of the user's that may block, in a process of the pool."""

    def __init__(self, name: str, function: Function, pool: ProcessPool) -> None:
        self.schema = schema_of(name, function)
        self._name = name
        self._pool = pool

    async def call(self, arguments: Mapping[str, Any], *, timeout_s: float) -> str:
        ok, text = await self._pool.call("call", self._name, dict(arguments), timeout_s=timeout_s)
        if not ok:
            raise ToolError(text)
        return str(text)
