"""An agent written with the official client, which is trained as it is; `pip install openai`.

    flash train --agent.run openai_agent:act --env sums --model Qwen/Qwen2.5-0.5B-Instruct

It knows a base URL, a key and a task, and answers with its reward. One of several turns is
`agents/examples/frozen_lake_openai.py`, which a small policy learns: `flash train
frozen_lake_openai`.
"""

from collections.abc import Mapping
from typing import Any

from openai import AsyncOpenAI


async def act(*, base_url: str, api_key: str, task: Any) -> Mapping[str, Any]:
    """Asks for the sum of two digits that the task's seed decides, and checks the answer."""
    left, right = divmod(task.seed % 100, 10)
    question = f"What is {left} + {right}? Answer with the number alone."
    async with AsyncOpenAI(base_url=base_url, api_key=api_key) as client:
        answer = await client.chat.completions.create(
            model="policy", messages=[{"role": "user", "content": question}]
        )
    said = answer.choices[0].message.content or ""
    solved = said.strip() == str(left + right)
    return {"reward": float(solved), "success": solved}
