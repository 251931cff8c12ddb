"""An MCP server with a notebook: `--agent.mcp '[{command: [python, examples/tools/notes_server.py],
each: episode}]'`, so that no episode reads what another has written."""

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("notes")
notes: list[str] = []


@server.tool()
def write(note: str) -> str:
    """Keeps a note."""
    notes.append(note)
    return f"note {len(notes)}"


@server.tool()
def read(number: int) -> str:
    """What a note says, by its number."""
    if not 1 <= number <= len(notes):
        raise ToolError(f"there is no note {number}")
    return notes[number - 1]


if __name__ == "__main__":
    server.run()
