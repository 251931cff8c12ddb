# /// script
# dependencies = ["openai"]
# ///
"""The official client: a loop of tools, streamed by its own helper."""

import json

from openai import OpenAI

TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks at a place.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}

client = OpenAI(max_retries=0)
messages = [{"role": "user", "content": "Where is the lamp?"}]
while True:
    asked = {"model": "policy", "messages": messages, "tools": [TOOL]}
    with client.chat.completions.stream(**asked) as stream:
        message = stream.get_final_completion().choices[0].message
    messages.append(message)
    if not message.tool_calls:
        break
    for call in message.tool_calls:
        result = {"role": "tool", "tool_call_id": call.id, "content": "a lamp"}
        messages.append(result)
print(json.dumps({"reward": 1.0, "said": message.content}))
