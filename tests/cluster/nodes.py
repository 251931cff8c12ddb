"""Nodes of a Ray cluster on one machine, in a process of their own.

It tells the cluster's address, then reads `add CORES` and `remove NAME` and answers each with the
node's name; it ends, with all nodes, when there is nothing more to read.
"""

import os
import subprocess
import sys


class Nodes:
    """That process, from here. Enter it; `address` is the cluster's."""

    def __enter__(self) -> "Nodes":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.nodes"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            # By itself Ray has what it starts wait for all else that runs on a machine.
            env=os.environ | {"RAY_worker_niceness": "0"},
        )  # fmt: skip
        self.address = self._answer()
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


def main() -> None:
    from ray.cluster_utils import Cluster  # noqa: PLC0415  (only this process has it)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    print(cluster.address, flush=True)
    nodes = {}
    for line in sys.stdin:
        what, argument = line.split()
        if what == "add":
            node = cluster.add_node(num_cpus=int(argument))
            name = node.node_id[:8]
            nodes[name] = node
        else:
            name = argument
            cluster.remove_node(nodes.pop(name), allow_graceful=False)
        print(name, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
