"""Who plays an episode together: the policy, the policy as it was, another model.

Earlier policies have workers of their own, which are seldom published to.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from flash.config import Config
from flash.config.agent import RoleConfig
from flash.errors import first_error
from flash.hub.config import EngineConfig
from flash.hub.gpus import worker_gpus
from flash.hub.hub import InferenceHub
from flash.parts.workers import open_hub
from flash.roles import Elsewhere, Role
from flash.section import revealed
from flash.system.machine import gpus
from flash.types import Completion, GenerateRequest, SamplingParams, Weights


class Earlier:
    """A hub for each number of steps after which its policy becomes the present one."""

    def __init__(self, hubs: Mapping[int, InferenceHub]) -> None:
        self.hubs = hubs

    async def publish(self, weights: Weights) -> None:
        """To those for which a multiple has been reached since they were published to."""
        due = [
            hub
            for every, hub in self.hubs.items()
            if weights.version // every > hub.version // every
        ]
        with first_error():
            async with asyncio.TaskGroup() as publishing:
                for hub in due:
                    publishing.create_task(
                        hub.publish(weights), name="publish to an earlier policy"
                    )


NONE_EARLIER = Earlier({})
"""Where nothing is trained: an earlier policy is the present one."""


@contextlib.asynccontextmanager
async def open_earlier(
    config: Config,
    *,
    model: str,
    version: int,
    weights: Callable[[], Awaitable[Weights]],
    log_dir: Path,
    say: Callable[[str], None],
) -> AsyncIterator[Earlier]:
    """One worker for each number of steps that an `agent.roles.NAME.earlier` has.

    ValueError if no GPU is left for it.
    """
    wanted = {
        role.earlier: f"agent.roles.{name}.earlier"
        for of_set in config.own_sets.values()
        for name, role in of_set.agent.roles.items()
        if role.earlier is not None
    }
    async with contextlib.AsyncExitStack() as opened:
        hubs = {}
        for number, (every, field) in enumerate(sorted(wanted.items())):
            engine = _engine(config.engine, config.trainer.ranks, number, f"{field}={every}")
            hubs[every] = await opened.enter_async_context(
                open_hub(
                    config.model_copy(update={"engine": engine}),
                    model=model,
                    version=version,
                    weights=weights,
                    log_dir=log_dir / f"earlier_{every}",
                    say=partial(_say_of, say, every),
                )
            )
        yield Earlier(hubs)


def _say_of(say: Callable[[str], None], every: int, told: str) -> None:
    say(f"the policy of every {every} steps: {told}")


def _engine(engine: EngineConfig, ranks: int, number: int, field: str) -> EngineConfig:
    """Of the worker with that number of an earlier policy, on GPUs that the run's have left."""
    devices = engine.devices or worker_gpus(gpus(), ranks)
    taken = (engine.workers + number) * engine.tensor_parallel
    left = devices[taken : taken + engine.tensor_parallel]
    if devices and not left and engine.kind != "embedded":
        raise ValueError(
            f"{field} takes a worker of its own, and the run's take all of the {len(devices)} "
            f"GPUs for workers: use fewer engine.workers, or engine.kind=embedded"
        )
    kind = "auto" if engine.kind == "urls" else engine.kind
    return engine.model_copy(
        update={
            "workers": 1, "urls": (), "kind": kind, "devices": left or devices, "transport": "disk",
        }
    )  # fmt: skip


def make_roles(
    settings: Mapping[str, RoleConfig], *, hub: InferenceHub, earlier: Earlier
) -> dict[str, Role]:
    """As the agent that plays with them takes them."""
    return {name: _role(role, hub, earlier) for name, role in settings.items()}


def _role(settings: RoleConfig, hub: InferenceHub, earlier: Earlier) -> Role:
    if settings.url:
        key = revealed(settings.api_key)
        return Role(elsewhere=Elsewhere(url=settings.url, model=settings.model, api_key=key))
    if settings.learns:
        return Role(share=settings.share)
    asked = hub if settings.earlier is None else earlier.hubs.get(settings.earlier, hub)

    async def generate(token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        return await asked.generate(GenerateRequest(token_ids=token_ids, sampling=sampling))

    return Role(generate=generate)
