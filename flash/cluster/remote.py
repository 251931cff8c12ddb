"""Actors of Ray as the roles that they are of, for who calls them."""

import asyncio
import contextlib
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayError, RayTaskError
from ray.runtime_env import RuntimeEnv

from flash.cluster.hosts import HostRole, Wanted
from flash.cluster.place import Place
from flash.cluster.roles import HostsAsked, Whereabouts
from flash.errors import NodeLost, ProcessEnded
from flash.system import machine

NAME_SHOWN = 8  # characters of a node's name
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


class RemoteExplorer:
    """An AskedExplorer: the role of `flash.cluster.explorer` in this actor, which Ray does not
    start again by itself."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def place(self) -> Place:
        place: Place = await self._ask("place")
        return place

    async def run(self) -> str:
        return str(await self._ask("run"))

    def end(self) -> None:
        _kill(self._actor)

    async def _ask(self, method: str) -> Any:
        try:
            return await getattr(self._actor, method).remote()
        except (ActorDiedError, OutOfMemoryError) as error:
            if isinstance(error, ActorDiedError) and error.actor_init_failed:
                raise
            raise NodeLost(f"an explorer's node or process has ended: {error}") from error


class RemoteProcesses:
    """A role of `flash.cluster.far`, wherever Ray has it by now."""

    def __init__(self, name: str, actor: Any) -> None:
        self.name = name
        self._actor = actor

    async def call(self, start: str, number: int, method: str, args: Sequence[Any]) -> Any:
        return await self._ask("call", start, number, method, args)

    async def wait_dead(self, start: str, number: int) -> str:
        return str(await self._ask("wait_dead", start, number))

    async def kill(self, start: str, number: int) -> None:
        await self._ask("kill", start, number)

    async def stop(self, start: str, number: int, grace_s: float) -> None:
        await self._ask("stop", start, number, grace_s)

    async def _ask_when_there(self, method: str, *arguments: Any) -> Any:
        pause_s = _FIRST_PAUSE_S
        while True:  # by itself Ray would try as often, and say so each time
            try:
                return await self._ask(method, *arguments)
            except NodeLost:  # until Ray has it on a node with room
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _ask(self, method: str, *arguments: Any) -> Any:
        """What the role answers, or raises. Nothing is asked twice: a step must not be made so."""
        try:
            once = getattr(self._actor, method).options(max_task_retries=0)
            return await once.remote(*arguments)
        except RayTaskError as error:
            raise error.cause from None
        except ActorDiedError as error:  # for good: it could not be made, or was killed
            raise ProcessEnded(f"{self.name} is no more: {error}") from error
        except RayError as error:
            raise NodeLost(
                f"{self.name} is lost: its node or its process has ended, or can't be reached "
                f"({type(error).__name__})"
            ) from error


class RemoteRanks(RemoteProcesses):
    """A RanksNode."""

    async def start(self, name: str, ranks: Sequence[int], logs: str) -> Place:
        place: Place = await self._ask_when_there("start", name, ranks, logs)
        return place


class RemoteHost(RemoteProcesses):
    """A HostNode."""

    async def place(self) -> Place:
        place: Place = await self._ask_when_there("place")
        return place

    async def start(self, name: str, number: int, wanted: Wanted) -> tuple[Place, str]:
        started: tuple[Place, str] = await self._ask_when_there("start", name, number, wanted)
        return started

    def end(self) -> None:
        _kill(self._actor)


class HostActor(HostRole):
    """In a process that Ray has placed."""

    def __init__(self, name: str, cpus: int) -> None:
        super().__init__(here(name, cpus))


def ranks_of(names: Sequence[str], address: str, namespace: str) -> list[RemoteRanks]:
    """The roles of those names of the cluster at that address, for this process, which is then one
    of the cluster's drivers."""
    _join(address, namespace)
    return [
        RemoteRanks(f"trainer-{number}", ray.get_actor(name))
        for number, name in enumerate(names, 1)
    ]


def hosts_of(asked: HostsAsked) -> Callable[[str], RemoteHost]:
    """Makes roles on the cluster, for this process, which is then one of its drivers and which they
    end with. Ray keeps them off nodes with GPUs as long as others have room."""
    _join(asked.address, asked.namespace, runtime_env=RuntimeEnv.deserialize(asked.runtime_env))
    actor = ray.remote(HostActor).options(num_cpus=asked.cpus, max_restarts=-1, max_task_retries=-1)
    return lambda name: RemoteHost(name, actor.remote(name, asked.cpus))


def here(role: str, cpus: int) -> Place:
    """Where this process of a cluster's is, in that role."""
    node = ray.get_runtime_context().get_node_id()
    return Place(
        role=role,
        node=node[:NAME_SHOWN],
        host=machine.where(),
        address=next(n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == node),
        pid=os.getpid(),
        cpus=cpus,
        gpus=tuple(machine.gpus()) if ray.get_gpu_ids() else (),
    )


def hosts_asked(cpus: int, count: int) -> HostsAsked:
    """Of the cluster that this process is in, with what its job has on every node."""
    context = ray.get_runtime_context()
    return HostsAsked(
        address=context.gcs_address,
        namespace=context.namespace,
        runtime_env=context.get_runtime_env_string(),
        cpus=cpus,
        count=count,
    )


def _kill(actor: Any) -> None:
    with contextlib.suppress(RayError):  # it ends with this process anyway
        ray.kill(actor)


def _join(address: str, namespace: str, **options: Any) -> None:
    ray.init(
        address=address,
        namespace=namespace,
        logging_level=logging.ERROR,
        log_to_driver=False,
        **options,
    )
