"""Loops as tests write them: settings beside the other options, held-out tasks played at once."""

from collections.abc import Sequence
from typing import Any

from flash.evaluation.play import play
from flash.evaluation.result import Evaluation
from flash.rollout.config import RolloutSettings
from flash.rollout.episode import AgentFactory
from flash.rollout.loop import RolloutLoop
from flash.types import Task

_SETTINGS = set(RolloutSettings.model_fields) - {"filters"}  # of which a test gives functions


def loop_options(**options: Any) -> dict[str, Any]:
    """A loop's arguments: what is one of its settings is gathered into `settings`."""
    settings = {name: options.pop(name) for name in _SETTINGS & options.keys()}
    return {"settings": RolloutSettings(**settings), **options}


async def evaluate(loop: RolloutLoop, agent: AgentFactory, tasks: Sequence[Task]) -> Evaluation:
    """As a run does it, with rollout paused."""
    with loop.paused():
        return await play(
            loop.hub,
            agent,
            tasks,
            concurrency=loop.capacity,
            max_attempts=loop.settings.max_attempts,
            stall_timeout_s=loop.settings.stall_timeout_s,
        )


async def evaluate_beside(
    loop: RolloutLoop, agent: AgentFactory, tasks: Sequence[Task]
) -> Evaluation:
    """As a run does it, on a worker of its own."""
    async with loop.hub.lend(1) as share:
        return await play(
            share,
            agent,
            tasks,
            concurrency=loop.capacity,
            stall_timeout_s=loop.settings.stall_timeout_s,
        )
