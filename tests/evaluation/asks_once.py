"""An agent of the user's own, which asks the model once and is content."""

import aiohttp


async def act(*, base_url, api_key, task):
    headers = {"Authorization": f"Bearer {api_key}"}
    body = {"model": "policy", "messages": [{"role": "user", "content": f"north {task.seed}"}]}
    async with (
        aiohttp.ClientSession(headers=headers) as session,
        session.post(f"{base_url}/chat/completions", json=body) as response,
    ):
        return {"reward": 1.0 if (await response.json())["choices"] else 0.0}
