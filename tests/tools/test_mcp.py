"""Real MCP servers, over standard streams and over HTTP: what they offer, and their end."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest
import uvicorn

from examples.tools.notes_server import server as notes
from flash.errors import EnvFailure
from flash.tools.config import McpConfig
from flash.tools.mcp import McpServer
from flash.tools.toolset import Toolset
from tests.tools.calls import asked

pytestmark = pytest.mark.slow

NOTES = Path(__file__).parents[2] / "examples/tools/notes_server.py"
SERVER = """
import os, time
from mcp.server.mcpserver import MCPServer
server = MCPServer("odd")

@server.tool()
def pid() -> str:
    return f"{os.getpid()} {os.environ.get('SHOWN')} {os.environ.get('HIDDEN')}"

@server.tool()
async def sleeps() -> str:
    import anyio
    await anyio.sleep(1e6)

@server.tool()
def dies() -> str:
    os._exit(3)

server.run()
"""


@pytest.fixture
def odd(tmp_path):
    path = tmp_path / "odd.py"
    path.write_text(SERVER)
    return [sys.executable, str(path)]


async def test_each_episode_has_a_server_of_its_own_and_no_more_than_have_room(tmp_path):
    config = McpConfig(command=(sys.executable, str(NOTES)), each="episode", at_once=2)
    async with Toolset([], [config], log_dir=tmp_path) as tools:
        assert [schema["function"]["name"] for schema in tools.schemas] == ["write", "read"]
        assert tools.schemas[0]["function"]["description"] == "Keeps a note."
        async with tools.of_episode() as one, tools.of_episode() as other:
            assert await asked(one, "write", note="mine") == "note 1"
            assert "there is no note 1" in await asked(other, "read", number=1)
            assert await asked(one, "read", number=1) == "mine"
            assert (await asked(one, "read", number="x")).startswith("Error: wrong arguments")
            third = asyncio.create_task(tools.of_episode().__aenter__())
            for _ in range(2):
                async with McpServer(config, log_path=tmp_path / "other.log"):
                    assert not third.done(), "it would have started in that time"
            third.cancel()


async def test_a_server_of_all_that_dies_fails_the_episode_and_is_started_anew(
    tmp_path, odd, monkeypatch
):
    monkeypatch.setenv("SHOWN", "here")
    monkeypatch.setenv("HIDDEN", "too")
    config = McpConfig(command=tuple(odd), env=("SHOWN",))
    tools = Toolset([], [config], timeout_s=20, log_dir=tmp_path)
    async with tools, tools.of_episode() as one, tools.of_episode() as other:
        first = await asked(one, "pid")
        assert first == await asked(other, "pid")
        assert first.split()[1:] == ["here", "None"]
        with pytest.raises(EnvFailure, match=r"the MCP server .*odd\.py was lost"):
            await asked(one, "dies")
        second = await asked(other, "pid")
        assert second.split()[0] != first.split()[0]
        os.kill(int(second.split()[0]), signal.SIGKILL)
        with pytest.raises(EnvFailure, match="was lost"):
            await asked(other, "pid")
        third = await asked(other, "pid")
    with pytest.raises(ProcessLookupError):
        os.kill(int(third.split()[0]), 0)


async def test_a_call_that_takes_too_long_is_told_and_costs_no_server(tmp_path, odd):
    config = McpConfig(command=tuple(odd), tools=("pid", "sleeps"))
    async with Toolset([], [config], timeout_s=0.5, log_dir=tmp_path) as tools:
        assert [schema["function"]["name"] for schema in tools.schemas] == ["pid", "sleeps"]
        async with tools.of_episode() as box:
            first = await asked(box, "pid")
            assert await asked(box, "sleeps") == "Error: sleeps took longer than 0.5 s"
            assert await asked(box, "pid") == first


async def test_a_server_by_its_url(tmp_path):
    app = notes.streamable_http_app()
    served = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    async with asyncio.TaskGroup() as tasks:
        serving = tasks.create_task(served.serve())
        while not served.started:
            await asyncio.sleep(0.01)
        port = served.servers[0].sockets[0].getsockname()[1]
        config = McpConfig(url=f"http://127.0.0.1:{port}/mcp")
        async with Toolset([], [config], log_dir=tmp_path) as tools, tools.of_episode() as box:
            assert await asked(box, "write", note="by HTTP") == "note 1"
            assert await asked(box, "read", number=1) == "by HTTP"
        served.should_exit = True
        await serving
    with pytest.raises(ValueError, match=r"agent\.mcp: the MCP server http://127.*can't be had"):
        async with Toolset([], [config], log_dir=tmp_path):
            pass


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"command": ("false",)}, r"agent\.mcp: the MCP server false can't be had"),
        (
            {"command": (sys.executable, str(NOTES)), "tools": ("reed",)},
            "has no tool 'reed'; it has write, read",
        ),
    ],
)
async def test_a_server_that_does_not_serve_is_told_at_the_start(tmp_path, options, why):
    with pytest.raises(ValueError, match=why):
        async with Toolset([], [McpConfig(**options)], log_dir=tmp_path):
            pass
