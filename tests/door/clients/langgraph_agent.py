# /// script
# dependencies = ["langchain", "langgraph", "langchain-openai"]
# ///
"""LangChain's agent, a graph of LangGraph's."""

import json

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI


def look(at: str) -> str:
    """Looks at a place."""
    return "a lamp"


agent = create_agent(ChatOpenAI(model="policy"), tools=[look])
done = agent.invoke({"messages": [{"role": "user", "content": "Where is the lamp?"}]})
print(json.dumps({"reward": 1.0, "said": done["messages"][-1].content}))
