"""Actors of Ray as the roles that they are of, for who calls them by name."""

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from flash.cluster.place import Place
from flash.cluster.roles import Whereabouts
from flash.errors import ProcessFailure
from flash.trainer.ranks import NodeLost

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0


class RemoteController:
    """The controller's role, as `flash.cluster.explorer` and `flash.cluster.ranks` ask it."""

    def __init__(self, name: str) -> None:
        self._controller = ray.get_actor(name)

    def whereabouts(self, known: Whereabouts | None, place: Place) -> Awaitable[Whereabouts | None]:
        found: Awaitable[Whereabouts | None] = self._controller.whereabouts.remote(known, place)
        return found

    def register(self, place: Place) -> Awaitable[None]:
        registered: Awaitable[None] = self._controller.register.remote(place)
        return registered


class RemoteRanks:
    """A RanksNode: a role of ranks, wherever Ray has it by now."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._actor = actor

    async def start(self, name: str, ranks: Sequence[int], logs: str) -> Place:
        pause_s = _FIRST_PAUSE_S
        while True:  # by itself Ray would try as often, and say so each time
            try:
                place: Place = await self._ask("start", name, ranks, logs)
                return place
            except NodeLost:  # until Ray has it on a node with room
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def call(self, start: str, rank: int, method: str, args: Sequence[Any]) -> Any:
        return await self._ask("call", start, rank, method, args)

    async def wait_dead(self, start: str, rank: int) -> str:
        return str(await self._ask("wait_dead", start, rank))

    async def kill(self, start: str, rank: int) -> None:
        await self._ask("kill", start, rank)

    async def stop(self, start: str, rank: int, grace_s: float) -> None:
        await self._ask("stop", start, rank, grace_s)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """What the role answers, or raises. Nothing is asked twice: a step must not be made so."""
        try:
            once = getattr(self._actor, method).options(max_task_retries=0)
            return await once.remote(*arguments)
        except RayTaskError as error:
            raise error.cause from None
        except ActorDiedError as error:  # for good: it could not be made, or was killed
            raise ProcessFailure(f"{self.name} is no more: {error}") from error
        except RayError as error:
            raise NodeLost(
                f"{self.name} is lost: its node or its process has ended, or can't be reached "
                f"({type(error).__name__})"
            ) from error


def ranks_of(names: Sequence[str], address: str, namespace: str) -> list[RemoteRanks]:
    """The roles of those names of the cluster at that address, for this process, which is then one
    of the cluster's drivers."""
    ray.init(address=address, namespace=namespace, logging_level=logging.ERROR, log_to_driver=False)
    return [
        RemoteRanks(f"trainer-{number}", ray.get_actor(name))
        for number, name in enumerate(names, 1)
    ]
