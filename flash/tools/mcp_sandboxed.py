"""MCP servers that run in sandboxes."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash.sandbox import Kind, Started, open_sandbox

if TYPE_CHECKING:
    from mcp.client._transport import TransportStreams

_LOG_BYTES = 1 << 20  # of what a server writes to its standard error


@contextlib.asynccontextmanager
async def mcp_in_sandbox(
    kind: Kind, command: Sequence[str], *, env: Mapping[str, str], log_path: Path
) -> "AsyncIterator[TransportStreams]":
    """A client's transport to a server that is started in a sandbox of its own.

    It sees the files and folders that its command names.
    """
    from mcp.shared.memory import create_client_server_memory_streams  # noqa: PLC0415

    named = {word: Path(word).absolute() for word in command[1:] if Path(word).exists()}
    async with (
        open_sandbox(kind, readable=list(named.values())) as sandbox,
        create_client_server_memory_streams() as (ours, (requests, answers)),
        asyncio.TaskGroup() as tasks,
    ):
        there = [command[0], *(str(named.get(word, word)) for word in command[1:])]
        server = await sandbox.start(there, env=env)
        moving = (_tell(server, requests), _hear(server, answers), _log(server, log_path))
        running = [tasks.create_task(each, name=f"MCP server {command[0]}") for each in moving]
        try:
            yield ours
        finally:
            for task in running:
                task.cancel()


async def _tell(server: Started, requests: Any) -> None:
    with contextlib.suppress(ConnectionError):  # it has ended, which its answers tell
        async for request in requests:
            line = request.message.model_dump_json(by_alias=True, exclude_unset=True)
            server.stdin.write(f"{line}\n".encode())
            await server.stdin.drain()


async def _hear(server: Started, answers: Any) -> None:
    """Until the server ends, or writes what is no line: the client sees its connection closed."""
    import anyio  # noqa: PLC0415
    from mcp.shared.message import SessionMessage  # noqa: PLC0415
    from mcp.types import jsonrpc_message_adapter  # noqa: PLC0415

    async with answers:
        # ValueError: a line that is too long.
        with contextlib.suppress(ValueError, anyio.BrokenResourceError, anyio.ClosedResourceError):
            async for line in server.stdout:
                try:
                    message = jsonrpc_message_adapter.validate_json(line, by_name=False)
                except ValueError as error:
                    await answers.send(error)
                else:
                    await answers.send(SessionMessage(message))


async def _log(server: Started, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    room = _LOG_BYTES
    with path.open("ab") as log:
        while data := await server.stderr.read(1 << 16):
            log.write(data[:room])
            log.flush()
            room -= len(data[:room])
