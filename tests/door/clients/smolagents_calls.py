# /// script
# dependencies = ["smolagents[openai]"]
# ///
"""The agent of smolagents that calls tools; its last call is `final_answer`."""

import json
import os

from smolagents import OpenAIServerModel, ToolCallingAgent, tool


@tool
def look(at: str) -> str:
    """Looks at a place.

    Args:
        at: the place.
    """
    return "a lamp"


model = OpenAIServerModel(
    "policy", api_base=os.environ["OPENAI_BASE_URL"], api_key=os.environ["OPENAI_API_KEY"]
)
agent = ToolCallingAgent(tools=[look], model=model, max_steps=3, verbosity_level=0)
print(json.dumps({"reward": 1.0, "said": str(agent.run("Where is the lamp?"))}))
