# /// script
# dependencies = ["pydantic-ai-slim[openai]"]
# ///
"""Pydantic AI's agent over chat completions."""

import json

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel

agent = Agent(OpenAIChatModel("policy"), instructions="Find things.")


@agent.tool_plain
def look(at: str) -> str:
    """Looks at a place."""
    return "a lamp"


print(json.dumps({"reward": 1.0, "said": agent.run_sync("Where is the lamp?").output}))
