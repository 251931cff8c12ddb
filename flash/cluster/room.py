"""Whether a cluster can hold what a run asks of it: found out before anything starts."""

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flash.cluster.config import ClusterConfig
from flash.config import Config

_ANSWERS_S = 10.0


@dataclass(frozen=True, slots=True)
class Node:
    """What a node of a cluster has in all, whoever uses it."""

    name: str
    cpus: float
    gpus: float

    def holds(self, cpus: int, gpus: int) -> int:
        """How many that take so much each."""
        by_cpus = int(self.cpus // cpus)
        return min(by_cpus, int(self.gpus // gpus)) if gpus else by_cpus

    def less(self, cpus: int, gpus: int) -> "Node":
        return Node(self.name, self.cpus - cpus, self.gpus - gpus)


def check_answers(address: str) -> None:
    """ValueError if nobody listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWERS_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"cluster.address={address!r}: nobody answers there ({error}): give host:port of the "
            f"cluster's head, as `ray status` tells it"
        ) from error


def check_room(
    asked: ClusterConfig, nodes: Sequence[Node], *, hosts: int = 0, pinned: str | None = None
) -> None:
    """ValueError if the trainer, or the least number of explorers with what they have, has no
    place.

    `hosts`: environment hosts and reward processes of an explorer. `pinned`: the node that alone
    has the run's disk, on which the controller must be.
    """
    trainer, explorers = asked.trainer, asked.explorers
    homes = [
        node
        for node in nodes
        if node.holds(trainer.cpus, trainer.gpus) and (not pinned or node.name == pinned)
    ]
    if len(homes) < trainer.nodes:
        of = f"cluster.trainer.nodes={trainer.nodes} of " if trainer.nodes > 1 else ""
        where = "no node has"
        if homes:
            where = f"only {_count(len(homes), 'node')} {'has' if len(homes) == 1 else 'have'}"
        if pinned is not None:
            where = f"node {pinned}, whose disk alone has the run's folder, lacks"
        raise ValueError(
            f"{of}cluster.trainer.cpus={trainer.cpus} with cluster.trainer.gpus={trainer.gpus}: "
            f"{where} them; there {_told(nodes)}: ask for less, or add a node"
        )

    def explorers_on(node: Node) -> int:
        return node.holds(explorers.cpus, explorers.gpus)

    lost = sorted(
        explorers_on(node) - explorers_on(node.less(trainer.cpus, trainer.gpus)) for node in homes
    )
    most = sum(map(explorers_on, nodes)) - sum(lost[: trainer.nodes])
    if most < explorers.min:
        of_nodes = f", nodes={trainer.nodes}" if trainer.nodes > 1 else ""
        raise ValueError(
            f"cluster.explorers.min={explorers.min} of cluster.explorers.cpus={explorers.cpus} and "
            f"cluster.explorers.gpus={explorers.gpus}: beside the trainer "
            f"(cluster.trainer.cpus={trainer.cpus}, gpus={trainer.gpus}{of_nodes}) there is room "
            f"for {most}; "
            f"there {_told(nodes)}: ask for less, or add a node"
        )
    if asked.hosts.cpus and (needed := explorers.min * hosts):
        most = _room_for_hosts(asked, nodes, homes)
        if most < needed:
            raise ValueError(
                f"cluster.hosts.cpus={asked.hosts.cpus} of each of {needed} environment hosts and "
                f"reward processes, {hosts} of each of cluster.explorers.min={explorers.min}: "
                f"beside the trainer and these explorers there is room for {most}; "
                f"there {_told(nodes)}: ask for less, or add a node"
            )


def _room_for_hosts(asked: ClusterConfig, nodes: Sequence[Node], homes: Sequence[Node]) -> int:
    """The most of them that there is room for, wherever the trainer and the least number of
    explorers are; these have room."""
    trainer, explorers = asked.trainer, asked.explorers
    best = {(0, 0): 0}  # by how many nodes have ranks so far, and how many explorers are on them
    for node in nodes:
        before, best = best, {}
        for (ranks, playing), hosts in before.items():
            for trains in range(1 + (node in homes and ranks < trainer.nodes)):
                left = node.less(trains * trainer.cpus, trains * trainer.gpus)
                most = min(left.holds(explorers.cpus, explorers.gpus), explorers.min - playing)
                for more in range(most + 1):
                    rest = left.less(more * explorers.cpus, more * explorers.gpus)
                    key = ranks + trains, playing + more
                    room = hosts + rest.holds(asked.hosts.cpus, 0)
                    best[key] = max(best.get(key, 0), room)
    return best[trainer.nodes, explorers.min]


def check_shared(config: Config, marker: Path, shared: Callable[[Path], bool]) -> None:
    """ValueError for what ranks on several nodes need, and not each that may have some sees.

    `marker`: in `runs_dir`; `shared`: whether they all see a path.
    """
    needed = [("runs_dir", str(config.runs_dir), marker)]
    kl = config.trainer.kl
    for field, model in (("model", config.model), ("trainer.kl.reference", kl.reference)):
        if model and (folder := Path(model).expanduser()).is_dir():
            needed.append((field, model, folder.resolve()))
    for field, value, path in needed:
        if not shared(path):
            raise ValueError(
                f"{field}={value!r} with cluster.trainer.nodes={config.cluster.trainer.nodes}: not "
                f"all nodes that may have ranks see it: name a folder on a disk that they share, "
                f"or use cluster.trainer.nodes=1"
            )


def _told(nodes: Sequence[Node]) -> str:
    """Nodes that are alike together."""
    kinds: dict[tuple[float, float], int] = {}
    for node in nodes:
        kinds[node.cpus, node.gpus] = kinds.get((node.cpus, node.gpus), 0) + 1
    each = [
        f"{_count(number, 'node')} of {_count(cpus, 'core')} and {_count(gpus, 'GPU')}"
        for (cpus, gpus), number in kinds.items()
    ]
    return f"{'is' if len(nodes) == 1 else 'are'} {', '.join(each) or 'none'}"


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"
