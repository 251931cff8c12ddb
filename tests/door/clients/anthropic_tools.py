# /// script
# dependencies = ["anthropic"]
# ///
"""The official client's own tool runner, as agents of Claude's kind have their loop."""

import json

from anthropic import Anthropic, beta_tool


@beta_tool
def look(at: str) -> str:
    """Looks at a place.

    Args:
        at: the place.
    """
    return "a lamp"


client = Anthropic(max_retries=0)
runner = client.beta.messages.tool_runner(
    model="policy",
    max_tokens=200,
    tools=[look],
    messages=[{"role": "user", "content": "Where is the lamp?"}],
)
said = "".join(block.text for block in runner.until_done().content if block.type == "text")
print(json.dumps({"reward": 1.0, "said": said}))
