"""`flash train --cluster ray`: a run's roles as actors of Ray, from their start to their end.

    this process ──► Controller, on the trainer's node ──► flash train: its ranks, its log
         ▲  output         ▲ where is the run?                  │
         └─────────────────┤                                    ▼
    Ranks × nodes - 1 ─────┤ the trainer's further nodes ──► their ranks
    Explorer × max ────────┘ spread ───────────────────────► flash explore: its workers
                                                                 │
    Host × what environments and rewards have ◄──────────────────┘ where there are cores

The trainer's nodes are the bundles of one placement group, so that a run has all of them or none.

All explorers that there may be are asked for once the trainer has its nodes (asking.py). Those for
which there is no room wait in Ray's queue until a node joins, which is also what makes a cluster
that scales grow. What is lost with its node or process starts again wherever there is room; so does
the controller, where all nodes share the disk with the run's folder, and goes on from its log.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import sys
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group, placement_group_table
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from flash.cli.event_loop import run_loop
from flash.cluster.asking import AskedExplorers, Lack
from flash.cluster.config import ClusterTrainerConfig
from flash.cluster.controller import ControllerRole
from flash.cluster.explorer import ExplorerRole
from flash.cluster.ranks import RanksRole
from flash.cluster.remote import NAME_SHOWN, RemoteController, RemoteExplorer, here, hosts_asked
from flash.cluster.roles import Plan, plan_of
from flash.cluster.room import Node, check_answers, check_room, check_shared
from flash.config import Config
from flash.config.mistakes import validated
from flash.errors import ClusterFailure, first_error

_LOOK_S = 30.0  # for a node to say whether it sees a file
_LAST_WORDS_S = 30.0  # for explorers to leave, and for the last lines to come


class ControllerActor(ControllerRole):
    """In a process that Ray has placed."""

    def __init__(self, plan: Plan, cpus: int, ranks: Sequence[str]) -> None:
        """`ranks`: what the actors with ranks of further nodes are called."""
        context = ray.get_runtime_context()
        others = (context.gcs_address, context.namespace, *ranks) if ranks else ()
        super().__init__(plan, here("controller", cpus), others)


class RanksActor(RanksRole):
    """In a process that Ray has placed. `controller`: what that actor is called."""

    def __init__(self, plan: Plan, name: str, cpus: int, controller: str) -> None:
        super().__init__(plan, here(name, cpus), RemoteController(controller))


class ExplorerActor(ExplorerRole):
    """In a process that Ray has placed. `controller`: what that actor is called.

    `host_cpus`: of each environment host and reward process that it has on other nodes.
    """

    def __init__(self, plan: Plan, name: str, cpus: int, controller: str, host_cpus: int) -> None:
        hosts = hosts_asked(host_cpus, plan.hosts) if plan.hosts else None
        super().__init__(plan, here(name, cpus), RemoteController(controller), hosts)


def launch(config: Config) -> int:
    """Runs it on the cluster that it names, and returns its exit code.

    The first SIGINT or SIGTERM ends the run after its step, the next at once. Raises ValueError for
    what the cluster can't hold, ClusterFailure if it does not answer any more.
    """
    with _connected(config.cluster.address), _marker(config.runs_dir.resolve()) as marker:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        if config.cluster.trainer.nodes > 1:
            asked = config.cluster.trainer
            able = [node for node in nodes if _node(node).holds(asked.cpus, asked.gpus)]
            check_shared(config, marker, lambda path: _share(able, path))
            home = None
        else:
            home = None if _share(nodes, marker) else ray.get_runtime_context().get_node_id()
        check_room(
            config.cluster,
            [_node(node) for node in nodes],
            pinned=home and home[:NAME_SHOWN],
            hosts=config.hosted,
        )
        plan = plan_of(config, token=secrets.token_urlsafe(24), marker=marker)
        validated(Config, plan.settings | {"explorers": plan.settings["explorers"] | {"token": ""}})
        if home is not None:
            print(
                f"the nodes do not share {marker.parent}: the controller stays on this one, and "
                f"the run ends with it"
            )
        stop = asyncio.Event()
        try:
            return run_loop(_Launched(config, plan, home).until_over(stop), stop=stop)
        except RayTaskError as error:  # a role's own mistake, in its words
            raise error.cause from error
        except RayError as error:
            raise ClusterFailure(f"{type(error).__name__}: {error}") from error


class _Launched:
    """The actors of a run, asked for and not all there yet."""

    def __init__(self, config: Config, plan: Plan, home: str | None) -> None:
        asked, name = config.cluster, Path(plan.marker).name
        cpus, gpus = asked.trainer.cpus, asked.trainer.gpus
        ranks = [f"{name}-{number}" for number in range(1, asked.trainer.nodes)]
        nodes = _TrainersNodes(asked.trainer, home)
        lasting = {"max_restarts": -1, "max_task_retries": -1}
        of_node = [
            {"num_cpus": cpus, "num_gpus": gpus, "scheduling_strategy": bundle, **lasting}
            for bundle in nodes.bundles
        ]
        controller = ray.remote(ControllerActor).options(name=name, **of_node[0])
        self._controller = controller.remote(plan, cpus, ranks)
        self._ranks = [
            ray.remote(RanksActor)
            .options(name=called, **options)
            .remote(plan, f"trainer-{number}", cpus, name)
            for number, (called, options) in enumerate(zip(ranks, of_node[1:], strict=True), 1)
        ]
        explorer = ray.remote(ExplorerActor).options(
            num_cpus=asked.explorers.cpus,
            num_gpus=asked.explorers.gpus,
            scheduling_strategy="SPREAD",
            max_task_retries=-1,
        )

        def ask(number: int) -> RemoteExplorer:
            return RemoteExplorer(
                explorer.remote(
                    plan, f"explorer-{number}", asked.explorers.cpus, name, asked.hosts.cpus
                )
            )

        self._explorers = AskedExplorers(
            ask, asked.explorers.most, nodes, partial(print, file=sys.stderr, flush=True)
        )
        self._is_there = False

    async def until_over(self, stop: asyncio.Event) -> int:
        """The run's exit code."""
        try:
            with first_error():
                async with asyncio.TaskGroup() as tasks:
                    running = tasks.create_task(_of(self._controller.run), name="run")
                    telling = tasks.create_task(self._tell(), name="what is said")
                    playing = tasks.create_task(self._explorers.play(), name="explorers")
                    stopping = tasks.create_task(self._stop(stop, running), name="stop")
                    await asyncio.wait((running,))
                    stopping.cancel()
                    self._explorers.ask_no_more()
                    await asyncio.wait((telling, playing), timeout=_LAST_WORDS_S)
                    telling.cancel()
                    playing.cancel()
            return 130 if running.cancelled() else running.result()
        finally:
            for actor in (self._controller, *self._ranks):
                ray.kill(actor)

    async def _tell(self) -> None:
        """What the controller says, as if it ran here."""
        life, seen, last = "", 0, False
        while not last:
            life, seen, lines, last = await _of(self._controller.output, life, seen)
            self._is_there = True
            for stream, line in lines:
                print(line, file=sys.stderr if stream == "err" else sys.stdout, flush=True)

    async def _stop(self, stop: asyncio.Event, running: asyncio.Task[int]) -> None:
        await stop.wait()
        if self._is_there:
            await _of(self._controller.stop)
        else:
            print("stopped before the cluster had room", file=sys.stderr)
            running.cancel()


async def _of(method: Any, *arguments: Any) -> Any:
    """What a method of an actor returns."""
    return await method.remote(*arguments)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """This process as a driver: of the cluster at that address, of the one that this machine is
    in, or of a new one."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a warning, else
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": True}
    if address:
        check_answers(address)
    try:
        ray.init(address=address or "auto", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        if address or os.environ.get("RAY_ADDRESS"):
            named = f"cluster.address={address!r}" if address else "$RAY_ADDRESS"
            raise ValueError(
                f"{named}: {' '.join(str(error).split())}: give host:port of the head of a Ray "
                f"cluster, as `ray status` tells it"
            ) from error
        ray.init(include_dashboard=False, **options)
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _marker(runs: Path) -> Iterator[Path]:
    """A file by which nodes know that they share the disk of `runs`."""
    if "runtime_resources" in runs.parts:
        raise ValueError(
            f"runs_dir={str(runs)!r} is in the job's working directory, which Ray removes: name "
            f"another folder, on a disk that all nodes share"
        )
    runs.mkdir(parents=True, exist_ok=True)
    marker = runs / f".cluster-{uuid.uuid4().hex}"
    marker.touch()
    try:
        yield marker
    finally:
        marker.unlink(missing_ok=True)


class _TrainersNodes:
    """A placement group, of which each node of the trainer's is a bundle.

    `home`: the node that alone may be it, by its whole name.
    """

    def __init__(self, asked: ClusterTrainerConfig, home: str | None) -> None:
        self.count = asked.nodes
        self._asked = asked
        self._group = placement_group(
            [{"CPU": asked.cpus} | ({"GPU": asked.gpus} if asked.gpus else {})] * asked.nodes,
            strategy="STRICT_SPREAD",
            bundle_label_selector=None if home is None else [{"ray.io/node-id": home}],
        )

    @property
    def bundles(self) -> list[PlacementGroupSchedulingStrategy]:
        """How Ray is to schedule what is on each of them, the controller's first."""
        return [
            PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
            for number in range(self.count)
        ]

    async def lack(self) -> Lack:
        return await asyncio.to_thread(self._lack)

    def _lack(self) -> Lack:
        table = placement_group_table(self._group)
        if table["state"] == "CREATED":
            return Lack()
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        had = alive.keys() & table["bundles_to_node_id"].values()
        able = (_node(node) for name, node in alive.items() if name not in had)
        homes = {node.name for node in able if node.holds(self._asked.cpus, self._asked.gpus)}
        return Lack(self.count - len(had), homes)


def _share(nodes: list[dict[str, Any]], path: Path) -> bool:
    """Whether all of these nodes see it."""
    sees = ray.remote(_sees)
    asked = [
        sees.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(str(path))
        for node in nodes
        if node["NodeID"] != ray.get_runtime_context().get_node_id()
    ]
    try:
        return all(ray.get(asked, timeout=_LOOK_S))
    except RayError:  # it is going, or lacks what it takes to answer
        return False


def _sees(path: str) -> bool:
    return Path(path).exists()


def _node(node: dict[str, Any]) -> Node:
    has = node["Resources"]
    return Node(node["NodeID"][:NAME_SHOWN], has.get("CPU", 0), has.get("GPU", 0))
