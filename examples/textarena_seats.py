"""Those who play a game of TextArena for several, each a role; `pip install openai` first.

    flash train frozen_lake_openai --model org/model \
        --agent.run examples.textarena_seats:act \
        --env.options '{id: TicTacToe-v0}' --env.eval_options '{split: heldout}' \
        --agent.roles '{player: {}, rival: {earlier: 20}}' \
        --agent.max_tokens 64 --agent.max_sequence_tokens 8192

There are as many roles as the game has players. Who has which seat is decided by the seed: a role
plays them all, and the episodes of a group compare what was done in the same one. The episode's
reward is that of the first role; each that is trained has its own.
"""

from collections.abc import Mapping
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from flash.envs.textarena import TextArenaTable


async def act(*, roles: Mapping[str, Mapping[str, str]], task: Any) -> Mapping[str, Any]:
    """One game, with `task.options` as `TextArenaTable` takes them."""
    names = list(roles)
    table = TextArenaTable(players=len(names), **task.options)
    table.reset(seed=task.seed)
    role_at = [names[(seat + task.seed) % len(names)] for seat in range(len(names))]
    talks: dict[str, list[Any]] = {name: [] for name in names}
    done = False
    # Unless told otherwise, a client loads the certificates of the world, which is 40 ms of work.
    async with DefaultAsyncHttpxClient(verify=False, timeout=600) as http:
        clients = {
            name: AsyncOpenAI(
                base_url=access["base_url"], api_key=access["api_key"], http_client=http
            )
            for name, access in roles.items()
        }
        while not done:
            seat, seen = table.turn()
            talk = talks[role_at[seat]]
            talk.append({"role": "user", "content": seen})
            answer = await clients[role_at[seat]].chat.completions.create(
                model="policy", messages=talk
            )
            said = answer.choices[0].message.content or ""
            talk.append({"role": "assistant", "content": said})
            done = table.step(said)
    rewards = {role_at[seat]: reward for seat, reward in enumerate(table.rewards())}
    reward = rewards[names[0]]
    return {"reward": reward, "rewards": rewards, "success": reward > 0}
