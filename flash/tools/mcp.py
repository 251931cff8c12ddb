"""Tools of MCP servers, by the official client (`pip install 'flash-rl[mcp]'`)."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash.deadline import Deadline
from flash.errors import EnvFailure, one_line
from flash.sandbox import Kind
from flash.tools.config import McpConfig
from flash.tools.mcp_sandboxed import mcp_in_sandbox
from flash.tools.tool import Schema, ToolError

if TYPE_CHECKING:
    from mcp import Client
    from mcp.types import CallToolResult

_START_TIMEOUT_S = 60.0


class McpServer:
    """A connection to one server; `async with` keeps it.

    A server that is lost fails the calls that it had with EnvFailure, and so their episodes; the
    next call connects anew.

    Args:
        log_path: what a command writes to its standard error.
        sandbox: of which kind a command runs in one, if it does.
    """

    def __init__(self, config: McpConfig, *, log_path: Path, sandbox: Kind | None = None) -> None:
        self._config = config
        self._log_path = log_path
        self._sandbox = sandbox
        self._tasks = asyncio.TaskGroup()
        self._connection: _Connection | None = None
        self._connecting = asyncio.Lock()  # held while the connection is made, or made anew
        self.schemas: list[Schema] = []

    async def __aenter__(self) -> "McpServer":
        await self._tasks.__aenter__()
        try:
            connection = await self._connected()
            self.schemas = await self._listed(connection.client)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._connection is not None:
            self._connection.close()
        await self._tasks.__aexit__(None, None, None)

    async def call(self, name: str, arguments: Mapping[str, Any], *, timeout_s: float) -> str:
        """As `Tool.call`."""
        from mcp import MCPError  # noqa: PLC0415
        from mcp.types import CONNECTION_CLOSED  # noqa: PLC0415

        connection = await self._connected()
        try:
            with Deadline(timeout_s) as deadline:
                result = await connection.client.call_tool(name, dict(arguments))
        except TimeoutError as error:
            if deadline.expired:
                raise
            raise self._lost(connection, error) from error
        except MCPError as error:
            if error.code != CONNECTION_CLOSED:
                raise ToolError(error.message) from error
            raise self._lost(connection, error) from error
        except Exception as error:  # the boundary to the client's transports, which may raise any
            raise self._lost(connection, error) from error
        text = _text_of(result)
        if result.is_error:
            raise ToolError(text)
        return text

    def _lost(self, connection: "_Connection", error: Exception) -> EnvFailure:
        connection.close()
        return EnvFailure(f"the MCP server {self._config} was lost: {one_line(error)}")

    async def _connected(self) -> "_Connection":
        async with self._connecting:
            if self._connection is None or self._connection.closing.is_set():
                connection = _Connection(
                    self._config, self._log_path, self._tasks, sandbox=self._sandbox
                )
                self._connection = connection
                try:
                    with Deadline(_START_TIMEOUT_S):
                        await asyncio.shield(connection.ready)
                except BaseException as error:
                    connection.close()
                    if isinstance(error, TimeoutError):
                        raise EnvFailure(
                            f"the MCP server {self._config} did not start in {_START_TIMEOUT_S:g} s"
                        ) from error
                    raise
            return self._connection

    async def _listed(self, client: "Client") -> list[Schema]:
        """Of the tools that are offered. ValueError for a name that is none of them."""
        found: dict[str, Schema] = {}
        cursor: str | None = None
        while True:
            page = await client.list_tools(cursor=cursor)
            for tool in page.tools:
                function = {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": tool.input_schema,
                }
                found[tool.name] = {"type": "function", "function": function}
            cursor = page.next_cursor
            if not cursor:
                break
        if unknown := [name for name in self._config.tools if name not in found]:
            raise ValueError(
                f"agent.mcp: {self._config} has no tool {unknown[0]!r}; it has {', '.join(found)}"
            )
        return [found[name] for name in self._config.tools or found]


class _Connection:
    """One client, in a task of its own, as its transports need it."""

    def __init__(
        self,
        config: McpConfig,
        log_path: Path,
        tasks: asyncio.TaskGroup,
        *,
        sandbox: Kind | None,
    ) -> None:
        self.closing = asyncio.Event()
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.client: Client
        self._config = config
        self._log_path = log_path
        self._sandbox = sandbox
        self._task = tasks.create_task(self._run(), name=f"MCP server {config}")

    def close(self) -> None:
        self.closing.set()
        if not self.ready.done():
            self._task.cancel()

    async def _run(self) -> None:
        """Until it is closed; what goes wrong before it is ready is EnvFailure there."""
        try:
            async with self._open() as self.client:
                if not self.ready.done():
                    self.ready.set_result(None)
                await self.closing.wait()
        except Exception as error:  # the boundary to the client and its transports
            if not self.ready.done():
                self.ready.set_exception(
                    EnvFailure(f"the MCP server {self._config} can't be had: {_first(error)}")
                )
        finally:
            self.closing.set()
            self.ready.cancel()

    @contextlib.asynccontextmanager
    async def _open(self) -> AsyncIterator["Client"]:
        from mcp import Client, StdioServerParameters, stdio_client  # noqa: PLC0415

        if self._config.url:
            async with Client(self._config.url) as client:
                yield client
            return
        command, *args = self._config.command
        given = (entry.partition("=") for entry in self._config.env)
        env = {name: value if set_here else os.environ[name] for name, set_here, value in given}
        if self._sandbox is not None:
            transport = mcp_in_sandbox(
                self._sandbox, self._config.command, env=env, log_path=self._log_path
            )
            async with Client(transport) as client:
                yield client
            return
        parameters = StdioServerParameters(command=command, args=args, env=env)
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        with self._log_path.open("a") as log:
            async with Client(stdio_client(parameters, errlog=log)) as client:
                yield client


class McpTool:
    """One tool of a server."""

    def __init__(self, schema: Schema, server: McpServer) -> None:
        self.schema = schema
        self._server = server

    async def call(self, arguments: Mapping[str, Any], *, timeout_s: float) -> str:
        name = self.schema["function"]["name"]
        return await self._server.call(name, arguments, timeout_s=timeout_s)


def _text_of(result: "CallToolResult") -> str:
    """Its texts; of what is none its kind is told."""
    return "\n".join(
        part.text if part.type == "text" else f"({part.type} left out)" for part in result.content
    )


def _first(error: BaseException) -> str:
    """Of errors within groups, as transports raise them, the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return one_line(error)
