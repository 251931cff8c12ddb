"""The tools of a run's agents, and how an episode comes by its own."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from flash.answers import shown
from flash.errors import EnvFailure
from flash.sandbox import Kind, check_sandbox
from flash.system.pool import ProcessPool
from flash.system.process import Child, StartProcess
from flash.tools.config import McpConfig
from flash.tools.functions import (
    FIELD,
    CoroutineTool,
    Function,
    ProcessTool,
    function_of,
    is_coroutine,
    schema_of,
)
from flash.tools.host import ToolHost
from flash.tools.mcp import McpServer, McpTool
from flash.tools.sandboxed import SandboxedFunctions
from flash.tools.tool import Schema, Tool, Toolbox, name_of


class Toolset:
    """Functions and MCP servers as tools; `async with` starts processes and servers.

    Args:
        functions: by `module:name`. Coroutines run in the event loop, all others in `processes`.
        servers: of those that are for each episode one is opened at the start, too, to be asked
            what it has.
        sandbox: of which kind functions and commands run in sandboxes, if they do.
        timeout_s, max_chars: of one call, of one result.
        log_dir: where processes and servers write.
        start: starts each process.

    Entering raises ValueError for a tool that can't be had, and for two of one name.
    """

    def __init__(
        self,
        functions: Sequence[str],
        servers: Sequence[McpConfig],
        *,
        processes: int = 2,
        sandbox: Kind | None = None,
        timeout_s: float = 60.0,
        max_chars: int = 20_000,
        log_dir: Path,
        start: StartProcess = Child.start,
    ) -> None:
        self.schemas: list[Schema] = []
        self._functions = functions
        self._servers = [
            _Servers(server, log_dir / f"mcp_{n}.log", sandbox) for n, server in enumerate(servers)
        ]
        self._processes = processes
        self._sandbox = sandbox
        self._sandboxed: SandboxedFunctions | None = None
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self._log_dir = log_dir
        self._start = start
        self._tools: list[Tool] = []
        self._opened = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._open()
        except BaseException:
            await self._opened.aclose()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._opened.aclose()

    @contextlib.asynccontextmanager
    async def of_episode(self) -> AsyncIterator[Toolbox]:
        """What one episode can call, until it is left."""
        async with contextlib.AsyncExitStack() as opened:
            tools = list(self._tools)
            if self._sandboxed is not None:
                tools += await opened.enter_async_context(self._sandboxed.of_episode())
            for servers in self._servers:
                server = await opened.enter_async_context(servers.of_episode())
                tools += (McpTool(schema, server) for schema in servers.schemas)
            yield Toolbox(tools, timeout_s=self._timeout_s, max_chars=self._max_chars)

    async def _open(self) -> None:
        functions = {name: function_of(name) for name in self._functions}
        if self._sandbox is not None:
            await asyncio.to_thread(check_sandbox, self._sandbox)
        if self._sandbox is None:
            await self._open_here(functions)
        elif functions:
            self._sandboxed = SandboxedFunctions(self._sandbox, functions)
            await self._sandboxed.check()
        self.schemas += (schema_of(name, function) for name, function in functions.items())
        for servers in self._servers:
            await self._opened.enter_async_context(servers)
            self.schemas += servers.schemas
        names = [name_of(schema) for schema in self.schemas]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"{FIELD} and agent.mcp have two tools named {twice[0]!r}: leave one out (a server "
                f"offers its `tools` only)"
            )

    async def _open_here(self, functions: Mapping[str, Function]) -> None:
        if blocking := [name for name, made in functions.items() if not is_coroutine(made)]:
            pool = ProcessPool(
                "flash.tools.host",
                ToolHost,
                blocking,
                role="tool",
                failure=EnvFailure,
                processes=self._processes,
                log_dir=self._log_dir,
                start=self._start,
            )
            await self._opened.enter_async_context(pool)
        for name, function in functions.items():
            self._tools.append(
                ProcessTool(name, function, pool)
                if name in blocking
                else CoroutineTool(name, function)
            )


class _Servers:
    """One MCP server for all episodes, or one for each."""

    def __init__(self, config: McpConfig, log_path: Path, sandbox: Kind | None) -> None:
        self.schemas: list[Schema] = []
        self._config = config
        self._sandbox = sandbox
        self._log_path = log_path
        self._room = asyncio.Semaphore(config.at_once)
        self._shared: McpServer | None = None
        self._opened = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            server = await self._opened.enter_async_context(self._server())
        except EnvFailure as failure:
            raise ValueError(f"agent.mcp: {failure}") from failure
        self.schemas = server.schemas
        if self._config.each == "run":
            self._shared = server
        else:
            await self._opened.aclose()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._opened.aclose()

    @contextlib.asynccontextmanager
    async def of_episode(self) -> AsyncIterator[McpServer]:
        if self._shared is not None:
            yield self._shared
            return
        async with self._room, self._server() as server:
            if server.schemas != self.schemas:
                names = [name_of(schema) for schema in server.schemas]
                raise EnvFailure(
                    f"the MCP server {self._config} has other tools than at the start: "
                    f"{shown(names)}"
                )
            yield server

    def _server(self) -> McpServer:
        return McpServer(self._config, log_path=self._log_path, sandbox=self._sandbox)
