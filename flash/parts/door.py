"""The door of a run, for agents of the user's own."""

import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from flash.config import Config
from flash.door import Door
from flash.hub.hub import InferenceHub


@contextlib.asynccontextmanager
async def open_door(
    config: Config, hub: InferenceHub, *, tokenizer: Any, told_in: Path | None = None
) -> AsyncIterator[Door | None]:
    """The door through which an agent of the user's own reaches the policy, if it is wanted.

    With `told_in` it is a run's door: at the configured port, and while it is open its URL and
    token are in that file, which only its owner can read.
    """
    port = config.engine.door_port if told_in is not None else None
    agents = [of_set.agent for of_set in config.own_sets.values()]
    has_own = any(agent.run for agent in agents)
    if not has_own and port is None:
        yield None
        return
    if has_own and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"model={config.model!r} has no chat template, so an agent can't chat with it "
            f"(agent.run): use an instruction-tuned model"
        )
    # Whatever it takes the model for, there is one only.
    ignore = {"model"}.union(*(agent.ignore for agent in agents))
    async with Door(
        hub, tokenizer=tokenizer, model="policy", ignore=ignore, port=port or 0
    ) as door:
        if told_in is None:
            yield door
            return
        told_in.parent.mkdir(parents=True, exist_ok=True)
        told_in.unlink(missing_ok=True)
        told_in.touch(mode=0o600)
        told_in.write_text(json.dumps({"url": door.url, "token": door.token}))
        try:
            yield door
        finally:
            told_in.unlink(missing_ok=True)
