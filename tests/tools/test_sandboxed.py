"""Tools in sandboxes: functions and MCP servers, and what they see."""

import sys
from pathlib import Path

import pytest

from flash.errors import EnvFailure
from flash.tools.config import McpConfig
from flash.tools.toolset import Toolset
from tests.sandboxes import needs_sandbox
from tests.tools.calls import asked

pytestmark = [pytest.mark.slow, needs_sandbox]

NOTES = Path(__file__).parents[2] / "examples/tools/notes_server.py"
FUNCTIONS = [f"tests.tools.functions:{name}" for name in ("add", "table", "fails", "prints", "pid")]
FAULTY = [f"tests.tools.functions:{name}" for name in ("blocks", "dies", "thing", "hoards")]
SHELL = "examples.tools.shell:bash"


def in_sandbox(functions, servers=(), **options):
    return Toolset(functions, servers, sandbox="local", **options)


async def test_functions_answer_as_they_do_outside(tmp_path):
    async with in_sandbox(FUNCTIONS, log_dir=tmp_path) as tools:
        assert [name["function"]["name"] for name in tools.schemas] == [
            *("add", "table", "fails", "prints", "pid")
        ]
        async with tools.of_episode() as box:
            assert await asked(box, "add", a=2, b=3) == "5"
            assert await asked(box, "table") == '{"rows":[1,2]}'
            assert await asked(box, "fails", how="so") == "Error: ValueError: so"
            assert await asked(box, "prints", what="wörds") == "wörds"
            assert await asked(box, "pid") == "2"  # of a namespace of its own


async def test_what_is_at_fault_is_told_or_ends_the_episode(tmp_path):
    async with (
        in_sandbox(FAULTY, log_dir=tmp_path, timeout_s=1.5) as tools,
        tools.of_episode() as box,
    ):
        assert await asked(box, "blocks") == "Error: blocks took longer than 1.5 s"
        assert (await asked(box, "hoards")).startswith(
            ("Error: it needed more than 1024 MB of memory", "Error: MemoryError")
        )
        with pytest.raises(EnvFailure, match=r"'tests.tools.functions:dies' did not .*code 3"):
            await asked(box, "dies")
        with pytest.raises(EnvFailure, match="did not answer.*code 1: TypeError.*object"):
            await asked(box, "thing")


async def test_an_episode_keeps_its_files_and_sees_no_others(tmp_path, monkeypatch):
    monkeypatch.setenv("API_KEY", "hush-hush")
    async with (
        in_sandbox([SHELL], log_dir=tmp_path) as tools,
        tools.of_episode() as one,
        tools.of_episode() as other,
    ):
        assert await asked(one, "bash", command="echo mine > a; pwd") == "/work\n\n(exit code 0)"
        assert await asked(one, "bash", command="cat a") == "mine\n\n(exit code 0)"
        assert "No such file" in await asked(other, "bash", command="cat a")
        assert "hush" not in await asked(other, "bash", command="env")
        told = await asked(other, "bash", command=f"touch {Path(__file__).parent}/x")
        assert "Read-only file system" in told or "No such file" in told


async def test_a_function_that_needs_what_is_not_seen_is_refused_at_the_start(
    tmp_path, monkeypatch
):
    (tmp_path / "beside.py").write_text("A = 1\n")
    (tmp_path / "needy.py").write_text("import beside\n\ndef f() -> int:\n    '''F.'''\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"agent\.tools='needy:f' .*sees .*needy\.py alone: .*beside"
    ):
        async with in_sandbox(["needy:f"], log_dir=tmp_path):
            pass


async def test_mcp_servers_run_in_sandboxes(tmp_path):
    server = tmp_path / "odd.py"
    server.write_text(SERVER)
    config = McpConfig(command=(sys.executable, str(server)), env=("SHOWN=here",))
    episodes = McpConfig(command=("python", str(NOTES)), each="episode", tools=("write", "read"))
    async with (
        in_sandbox([], [config, episodes], log_dir=tmp_path) as tools,
        tools.of_episode() as one,
        tools.of_episode() as other,
    ):
        assert await asked(one, "write", note="mine") == "note 1"
        assert "there is no note 1" in await asked(other, "read", number=1)
        assert await asked(one, "seen") == "2 here ['odd.py'] 30000"
        with pytest.raises(EnvFailure, match=r"the MCP server .*odd\.py was lost"):
            await asked(one, "dies")
        assert await asked(other, "seen") == "2 here ['odd.py'] 30000"
    assert "it says so" in (tmp_path / "mcp_0.log").read_text()


SERVER = """
import os, sys
from mcp.server.mcpserver import MCPServer
server = MCPServer("odd")
print("it says so", file=sys.stderr)

@server.tool()
def seen() -> str:
    folder = os.path.dirname(__file__)
    return f"{os.getpid()} {os.environ.get('SHOWN')} {os.listdir(folder)} {len('x' * 30000)}"

@server.tool()
def dies() -> str:
    os._exit(3)

server.run()
"""


@pytest.mark.parametrize("command", [("false",), ("cat", "/dev/zero")])
async def test_a_server_that_does_not_serve_is_told_at_the_start(tmp_path, command):
    with pytest.raises(
        ValueError, match=rf"agent\.mcp: the MCP server {command[0]}.* can't be had"
    ):
        async with in_sandbox([], [McpConfig(command=command)], log_dir=tmp_path):
            pass
