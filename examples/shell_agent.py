"""An agent of one's own in the task folders of Harbor or terminal-bench, through the door.

    TASKS=tasks flash train --agent.run shell_agent:act --env harbor --env.options.path tasks \\
      --env.options.without '[image]' --model org/model

What it says to the model is its own affair; its shell is the environment, which blocks, so that it
is called in threads. A framework's agent is given a shell in the same way: where it runs a command,
it calls `step`.
"""

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from openai import AsyncOpenAI

from flash.envs.harbor import HarborEnv


async def act(*, base_url: str, api_key: str, task: Any) -> Mapping[str, Any]:
    """Asks for one block of commands after another, and answers with what the tests gave."""
    env = HarborEnv(path=os.environ["TASKS"], without=["image"], max_turns=20)
    try:
        seen, _ = await asyncio.to_thread(env.reset, seed=task.seed)
        messages: list[Any] = []
        async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
            while True:
                messages.append({"role": "user", "content": seen})
                answer = await client.chat.completions.create(model="policy", messages=messages)
                said = answer.choices[0].message.content or ""
                messages.append({"role": "assistant", "content": said})
                seen, reward, ended, cut, info = await asyncio.to_thread(env.step, said)
                if ended or cut:
                    return {"reward": reward, "success": info["success"]}
    finally:
        await asyncio.to_thread(env.close)
