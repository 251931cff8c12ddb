# /// script
# dependencies = ["litellm"]
# ///
"""LiteLLM's completion with tools, its message sent back as it is."""

import json
import os

import litellm

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks at a place.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}

messages = [{"role": "user", "content": "Where is the lamp?"}]
while True:
    answer = litellm.completion(
        model="openai/policy",
        base_url=os.environ["OPENAI_BASE_URL"],
        messages=messages,
        tools=[TOOL],
    )
    message = answer.choices[0].message
    messages.append(message)
    if not message.tool_calls:
        break
    for call in message.tool_calls:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "a lamp"})
print(json.dumps({"reward": 1.0, "said": message.content}))
