"""An agent written with the official client, playing FrozenLake; `pip install openai` first.

    flash train frozen_lake_openai

It knows a base URL and a key, as it would of any provider; the reward is the world's. Nothing in
it is made for training but the names of what it is given.
"""

import asyncio
import json
import os
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import gymnasium
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

_LAKE = "flash.envs.frozen_lake:flash/FrozenLakeText-v0"


async def act(*, base_url: str, api_key: str, task: Any) -> Mapping[str, Any]:
    """Walks over the ice of `task.seed` until it ends; returns the reward and whether it arrived.

    The lake's arguments are `task.options`.
    """
    lake: gymnasium.Env[str, str] = gymnasium.make(_LAKE, disable_env_checker=True, **task.options)
    seen, info = lake.reset(seed=task.seed)
    messages: list[Any] = [{"role": "user", "content": f"{seen} {info['goal']}"}]
    done, total = False, 0.0
    # Unless told otherwise, a client loads the certificates of the world, which is 40 ms of work,
    # and gives up connecting after 5 s, which a busy machine may need.
    http = DefaultAsyncHttpxClient(verify=False, timeout=600)
    async with AsyncOpenAI(
        base_url=base_url, api_key=api_key, http_client=http, timeout=600
    ) as client:
        while not done:
            answer = await client.chat.completions.create(model="policy", messages=messages)
            move = answer.choices[0].message.content or ""
            seen, reward, terminated, truncated, info = lake.step(move)
            messages.append({"role": "assistant", "content": move})
            messages.append({"role": "user", "content": seen})
            done, total = terminated or truncated, total + float(reward)
    return {"reward": total, "success": info["success"]}


if __name__ == "__main__":
    # As a command: agent.run=[python, -m, flash.agents.examples.frozen_lake_openai]
    outcome = asyncio.run(
        act(
            base_url=os.environ["OPENAI_BASE_URL"],
            api_key=os.environ["OPENAI_API_KEY"],
            task=SimpleNamespace(**json.loads(os.environ["FLASH_TASK"])),
        )
    )
    print(json.dumps(outcome))
