"""A run on a Ray cluster of three nodes, all of them on this machine: nodes come and go."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from tests.cluster.deployed import entrypoint
from tests.cluster.nodes import Nodes
from tests.crash.account import Books, violations
from tests.tiny_runs import TINY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None,
        reason="Ray is not installed: pip install 'flash-rl[ray]', or make setup",
    ),
]

FLASH = [sys.executable, "-c", "from flash.cli.main import main; main()"]
STEP = r"^step +(\d+)/"


@pytest.fixture
def cluster():
    """A head and two more nodes, of one core each."""
    with Nodes() as nodes:
        for _ in range(2):
            nodes.add(1)
        yield nodes


class Driver:
    """`flash train` on a cluster, and what it says."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.said: list[str] = []
        self._new = threading.Condition()
        self.process = subprocess.Popen(
            [*FLASH, *command[1:]],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1", "RAY_DEDUP_LOGS": "0"},
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            with self._new:
                self.said.append(line.rstrip())
                self._new.notify_all()
        with self._new:
            self._new.notify_all()

    def says(self, pattern: str, *, since: int = 0) -> re.Match[str]:
        """The first line from number `since` on that has it, as soon as there is one."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            found[:] = [m for line in self.said[since:] if (m := re.search(pattern, line))][:1]
            return bool(found) or not self._reader.is_alive()

        with self._new:
            self._new.wait_for(look, timeout=300)
        assert found, f"{pattern} is not in {self.told()}"
        return found[0]

    def places(self, number: int) -> dict[str, str]:
        """The nodes of so many explorers, those that are placed first."""
        found: dict[str, str] = {}
        while len(found) < number:
            others = "".join(f"(?!{role}:)" for role in found)
            place = self.says(rf"^{others}(explorer-\d): node (\w+)")
            found[place.group(1)] = place.group(2)
        return found

    def told(self) -> str:
        """What it said, but for steps before the last ones."""
        steps = [line for line in self.said if re.search(STEP, line)]
        return "\n".join(line for line in self.said if line not in steps[:-3])

    def end(self) -> int:
        code = self.process.wait(120)
        self._reader.join()
        self.process.stdout.close()
        return code


def submitted(cluster: Nodes, folder: Path, fields: dict[str, object]) -> Driver:
    """A run of small steps, begun as the RayJob begins one."""
    fields = TINY | {"steps": 100_000, "name": "run", "eval_every": 0} | fields
    nested: dict = {"env": {"name": "frozen_lake"}, "agent": {"max_turns": 12, "max_tokens": 4}}
    for name, value in fields.items():
        *sections, last = name.split(".")
        inside = nested
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = value
    (folder / "run.yaml").write_text(yaml.safe_dump(nested))
    command = shlex.split(entrypoint().replace("/shared", str(folder)))
    return Driver([*command, "--cluster.address", cluster.address], folder)


def whole_steps(folder: Path) -> int:
    """How many the run of that folder began; nothing of them is lost, or came twice."""
    run = folder / "runs/run"
    assert not list((folder / "runs").glob(".cluster-*"))
    books = Books("", run)
    steps = len(books.batches())
    settings = yaml.safe_load((run / "config.yaml").read_text()) | {"steps": steps}
    stopped_at_last = f"metrics.jsonl has the steps {list(range(steps))}"  # its batch is logged
    assert list(violations(books, run, settings)) in ([], [stopped_at_last])
    return steps


def step(line: re.Match[str]) -> int:
    return int(line.group(1))


def test_a_run_learns_while_nodes_leave_and_join_and_its_controller_is_killed(cluster, tmp_path):
    fields = {"cluster.explorers.min": 2, "cluster.explorers.max": 3}
    driver = submitted(cluster, tmp_path, fields)
    try:
        home = driver.says(r"^controller: node (\w+)").group(1)
        where = driver.places(2)
        assert len({home, *where.values()}) == 3, "they are spread"
        driver.says(STEP)

        lost = next(role for role, node in where.items() if node in cluster.added)
        waits = next(f"explorer-{n}" for n in range(3) if f"explorer-{n}" not in where)
        before = len(driver.said)
        cluster.remove(where[lost])
        joined = cluster.add(2)
        for role in (lost, waits):
            driver.says(rf"^{role}: node {joined}", since=before)
        for role in (lost, waits):  # what starts later would say which engine it has
            driver.says(rf"plays for run run as {role}", since=before)
        before = len(driver.said)
        at = step(driver.says(STEP, since=before))

        placed = json.loads((tmp_path / "runs/run/placement.json").read_text())
        assert [place["role"] for place in placed] == [
            "controller", "explorer-0", "explorer-1", "explorer-2",
        ]  # fmt: skip
        before = len(driver.said)
        os.kill(placed[0]["pid"], signal.SIGKILL)
        driver.says(r"^goes on from .* logged batches", since=before)
        assert step(driver.says(STEP, since=before)) >= at
        before = len(driver.said)
        driver.says(STEP, since=before)
        assert not any("engine:" in line for line in driver.said[before:]), "explorers live on"

        driver.process.send_signal(signal.SIGINT)
        assert driver.end() == 0, driver.told()
    finally:
        driver.process.kill()
        driver.end()
    assert whole_steps(tmp_path) > at


def test_ranks_on_two_nodes_make_the_steps_of_one_whatever_is_lost_of_them(tmp_path):
    with Nodes() as cluster:
        nodes = [cluster.add(2) for _ in range(2)]
        fields = {"cluster.trainer.nodes": 2, "cluster.trainer.cpus": 2, "trainer.ranks": 2}
        fields |= {"cluster.explorers.max": 3}  # two wait, and would fit into the trainer's nodes
        fields |= {"trainer.entropy_bonus": 0.01}  # something to learn without any success
        driver = submitted(cluster, tmp_path, fields)
        try:
            home = driver.says(r"^controller: node (\w+)").group(1)
            away = driver.says(r"^trainer-1: node (\w+)").group(1)
            assert {home, away} == {*nodes}
            (plays,) = driver.places(1)
            driver.says(STEP)

            before = len(driver.said)
            cluster.remove(away)
            driver.says("flash.trainer.lasting: trainer rank .*; restart 1 ", since=before)
            driver.says("the trainer waits for a node for trainer-1, however long", since=before)
            status = json.loads((tmp_path / "runs/run/status.json").read_text())
            assert "a node for trainer-1" in [role["waits_for"] for role in status["roles"]]
            joined = cluster.add(2)
            driver.says(rf"^trainer-1: node {joined}", since=before)
            before = len(driver.said)
            at = step(driver.says(STEP, since=before))

            placed = json.loads((tmp_path / "runs/run/placement.json").read_text())
            assert [place["role"] for place in placed] == ["controller", plays, "trainer-1"]
            before = len(driver.said)
            os.kill(placed[0]["pid"], signal.SIGKILL)  # trainer-1 still has its ranks
            driver.says(r"^goes on from .* logged batches", since=before)
            assert step(driver.says(STEP, since=before)) >= at

            before = len(driver.said)
            cluster.remove(joined)
            back = cluster.add(2)  # Ray does not know yet, and gives it to explorers that wait
            driver.says(rf"^trainer-1: node {back}", since=before)
            before = len(driver.said)
            driver.says(STEP, since=before)
            spare = cluster.add(2)
            for role in {"explorer-0", "explorer-1", "explorer-2"} - {plays}:
                driver.says(rf"^{role}: node {spare}", since=before)
            driver.process.send_signal(signal.SIGINT)
            assert driver.end() == 0, driver.told()
        finally:
            driver.process.kill()
            driver.end()
    assert whole_steps(tmp_path) > at
    run = tmp_path / "runs/run"
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["grad_norm"] > 0
    retrained = subprocess.run(
        [*FLASH, "replay", str(run), "--retrain"], text=True, capture_output=True, check=False
    )
    assert "weights equal to the last bit to those of" in retrained.stdout, retrained.stderr


def test_environment_hosts_are_where_there_are_cores_and_those_of_a_lost_node_elsewhere(tmp_path):
    with Nodes() as cluster:
        for _ in range(2):  # one for the controller, one for the explorer
            cluster.add(2)
        fields = {"cluster.trainer.cpus": 2, "cluster.explorers.cpus": 2, "env.hosts": 2}
        fields |= {"cluster.explorers.min": 0, "cluster.hosts.cpus": 3}
        driver = submitted(cluster, tmp_path, fields)
        try:
            driver.says("explorer-0 waits for a node for 2 of its 2 environment hosts and reward")
            lost = cluster.add(6)
            driver.says(rf"explorer-0: environment hosts and .*: 2 on node {lost} ")
            driver.says("plays for run run as explorer-0")
            driver.says(STEP)
            before = len(driver.said)
            cluster.remove(lost)
            joined = cluster.add(6)
            driver.says(rf"explorer-0: environment hosts and .*: 2 on node {joined} ", since=before)
            before = len(driver.said)
            driver.says(STEP, since=before)
            assert not any("engine:" in line for line in driver.said[before:]), "it lives on"
            logs = tmp_path / "runs/run/explorers/explorer-0/logs"
            assert {path.name for path in logs.glob("env_*")} == {
                "env_host_0.log", "env_host_1.log",
            }  # fmt: skip
            driver.process.send_signal(signal.SIGINT)
            assert driver.end() == 0, driver.told()
        finally:
            driver.process.kill()
            driver.end()
    assert whole_steps(tmp_path) > 1
