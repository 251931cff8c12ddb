"""Tools that a policy calls within an episode: functions and MCP servers."""
