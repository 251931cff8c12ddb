"""Nodes of a Ray cluster on one machine, in a process of their own.

It tells the cluster's address, then reads `add CORES` and `remove NAME` and answers each with the
node's name; it ends, with all nodes, when there is nothing more to read.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import TypeVar

import psutil

T = TypeVar("T")
TRIES = 4


class Nodes:
    """That process, from here. Enter it; `address` is the cluster's."""

    def __enter__(self) -> "Nodes":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.nodes"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            # By itself Ray has what it starts wait for all else that runs on a machine.
            env=os.environ | {"RAY_worker_niceness": "0"},
        )  # fmt: skip
        try:
            self.address = self._answer()
        except BaseException:
            self.__exit__()
            raise
        self.added: list[str] = []  # beside the head
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def add(self, cores: int) -> str:
        """A node of so many cores: its name, as far as it is shown."""
        self.added.append(self._ask(f"add {cores}"))
        return self.added[-1]

    def remove(self, name: str) -> None:
        """Ends its processes at once."""
        self._ask(f"remove {name}")

    def _ask(self, line: str) -> str:
        print(line, file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> str:
        answer = self._process.stdout.readline().strip()
        assert answer, "the nodes have ended"
        return answer


def up(start: Callable[[], T]) -> T:
    """What a start gives. Ray gives nodes half a minute, which is too short on a busy machine: what
    has started till then is ended, and another one is tried."""
    before = set(psutil.Process().children())
    for left in reversed(range(TRIES)):
        try:
            return start()
        except Exception:
            if not left:
                raise
            for process in set(psutil.Process().children()) - before:
                process.kill()
    raise AssertionError


def main() -> None:
    from ray.cluster_utils import Cluster  # noqa: PLC0415  (only this process has it)

    cluster = up(lambda: Cluster(initialize_head=True, head_node_args={"num_cpus": 1}))
    print(cluster.address, flush=True)
    nodes = {}
    for line in sys.stdin:
        what, argument = line.split()
        if what == "add":
            cores = int(argument)
            node = up(lambda: cluster.add_node(num_cpus=cores))  # noqa: B023  (called at once)
            name = node.node_id[:8]
            nodes[name] = node
        else:
            name = argument
            cluster.remove_node(nodes.pop(name), allow_graceful=False)
        print(name, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
