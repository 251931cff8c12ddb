"""Methods of an environment as tools, which its class names in `tools`."""

import asyncio
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any

from flash import registry
from flash.deadline import Deadline
from flash.errors import EnvFailure
from flash.tools.functions import is_coroutine, schema_of
from flash.tools.tool import Schema, ToolError, name_of
from flash.types import AsyncEnv, Observation, ToolEnv

FIELD = "env.name"


def offered_by(name: str) -> list[Schema]:
    """What environments of that name offer. ValueError for what is no tool."""
    environment = registry.environment(name)
    methods = getattr(environment, "tools", ())
    if not isinstance(methods, tuple | list) or not all(isinstance(of, str) for of in methods):
        raise ValueError(
            f"{FIELD}={name!r} has tools={methods!r}: it must be a tuple of names of its methods"
        )
    return [_schema(name, environment, method) for method in methods]


def _schema(name: str, environment: Any, method: str) -> Schema:
    function = getattr(environment, method, None)
    if not inspect.isfunction(function) or is_coroutine(function):
        raise ValueError(
            f"{FIELD}={name!r} has {method!r} among its tools, which is none of its methods: "
            f"write def {method}(self, …)"
        )
    bound = types.MethodType(function, environment)  # which takes no self
    return schema_of(f"{name}.{method}", bound, field=FIELD)


class EnvTools:
    """The tools of one open environment, which are called one after the other.

    Args:
        timeout_s: for one call, as for a step: past it the environment has failed.

    Raises ValueError for schemas of an environment that is no ToolEnv.
    """

    def __init__(self, env: AsyncEnv, schemas: Sequence[Schema], *, timeout_s: float) -> None:
        if schemas and not isinstance(env, ToolEnv):
            raise ValueError(f"{type(env).__name__} has no `call`, which tools need: see ToolEnv")
        self.tools = [_EnvTool(schema, self) for schema in schemas]
        self._env = env
        self._timeout_s = timeout_s
        self._calling = asyncio.Lock()
        self._steps: list[Observation] = []

    def take_steps(self) -> list[Observation]:
        """What calls that were steps came to, since it was asked last."""
        steps, self._steps = self._steps, []
        return steps

    async def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        async with self._calling:
            assert isinstance(self._env, ToolEnv), "it has tools"
            if self._steps and self._steps[-1].done:
                raise ToolError("the episode is over")
            try:
                with Deadline(self._timeout_s):
                    answer = await self._env.call(name, arguments)
            except TimeoutError as error:
                raise EnvFailure(
                    f"tool {name!r} took longer than step_timeout_s={self._timeout_s:g}"
                ) from error
            if isinstance(answer, str):
                return answer
            self._steps.append(answer)
            return answer.text


class _EnvTool:
    def __init__(self, schema: Schema, tools: EnvTools) -> None:
        self.schema = schema
        self._tools = tools

    async def call(self, arguments: Mapping[str, Any], *, timeout_s: float) -> str:
        return await self._tools.call(name_of(self.schema), arguments)
