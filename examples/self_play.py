"""Two who play one game: the policy, and the policy as it was some steps ago.

    flash train frozen_lake_openai --agent.run self_play:act --env.eval_options '{}' \
        --agent.roles '{player: {}, rival: {earlier: 5}}'

Both say left or right. The player wins where the rival said the same, which it does not see. Each
role has a base URL and a key; what the rival says is not trained on.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

_ROUNDS = 3


async def act(*, roles: Mapping[str, Mapping[str, str]], task: Any) -> float:
    """Wins less losses, by round."""
    talks: dict[str, list[Any]] = {name: [] for name in roles}
    won = 0
    async with DefaultAsyncHttpxClient(verify=False, timeout=600) as http:
        clients = {
            name: AsyncOpenAI(
                base_url=access["base_url"], api_key=access["api_key"], http_client=http
            )
            for name, access in roles.items()
        }

        async def choose(name: str) -> str:
            talk = talks[name]
            answer = await clients[name].chat.completions.create(model="policy", messages=talk)
            said = answer.choices[0].message.content or ""
            talk.append({"role": "assistant", "content": said})
            return said.strip()

        heard = dict.fromkeys(roles, f"seed {task.seed % 10}")
        for _ in range(_ROUNDS):
            for name, talk in talks.items():
                talk.append({"role": "user", "content": heard[name]})
            mine, theirs = await asyncio.gather(choose("player"), choose("rival"))
            won += 1 if mine == theirs else -1
            heard = {"player": theirs, "rival": mine}
    return won / _ROUNDS
