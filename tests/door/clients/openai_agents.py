# /// script
# dependencies = ["openai-agents"]
# ///
"""OpenAI's agents, which speak /v1/responses."""

import json

from agents import Agent, Runner, function_tool, set_tracing_disabled

set_tracing_disabled(True)


@function_tool
def look(at: str) -> str:
    """Looks at a place."""
    return "a lamp"


agent = Agent(name="finder", instructions="Find things.", model="policy", tools=[look])
done = Runner.run_sync(agent, "Where is the lamp?")
print(json.dumps({"reward": 1.0, "said": done.final_output}))
