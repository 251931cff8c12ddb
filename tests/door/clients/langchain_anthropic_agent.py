# /// script
# dependencies = ["langchain", "langchain-anthropic"]
# ///
"""LangChain's agent over Anthropic's messages."""

import json

from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic


def look(at: str) -> str:
    """Looks at a place."""
    return "a lamp"


agent = create_agent(ChatAnthropic(model="policy"), tools=[look])
done = agent.invoke({"messages": [{"role": "user", "content": "Where is the lamp?"}]})
print(json.dumps({"reward": 1.0, "said": done["messages"][-1].text}))
