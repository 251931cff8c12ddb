"""Environment hosts and reward processes on other nodes: the seam, and real processes of roles that
are on this one, without a cluster."""

import asyncio
import os
import pickle
import re

import pytest

from flash.cluster.far import FarProcess
from flash.cluster.hosts import FarHosts, HostRole
from flash.cluster.place import Place
from flash.cluster.roles import HostsAsked
from flash.environments.host import EnvHost
from flash.environments.hosts import EnvHosts
from flash.errors import ClusterFailure, EnvFailure, NodeLost, ProcessEnded, RewardFailure
from flash.fakes import FakeHostNode
from flash.reward.processes import RewardProcesses
from flash.system.process import Declared, written
from flash.types import Observation, Task, Transcript
from flash.virtual_time import in_virtual_time

SEEN = Observation(text="a room")
ANSWERS = {"configure": None, "open": False, "reset": SEEN, "step": SEEN, "close": None, "score": 1}
TRANSCRIPT = Transcript(task=Task(0), text="", responses=("a",), reward=0.0, success=False)


class Cluster:
    """Makes nodes, and keeps them and what is said."""

    def __init__(self, answers=ANSWERS, *, full=False):
        self.nodes = []
        self.said = []
        self._answers = answers
        self._full = full

    def new(self, name):
        self.nodes.append(node := FakeHostNode(name, self._answers))
        if self._full:
            node.lose()
        return node

    def hosts(self, count):
        return FarHosts(self.new, of="explorer-0", count=count, cpus=2, say=self.said.append)


def environments(start, folder, count=1):
    return EnvHosts("e", {}, hosts=count, call_timeout_s=60, log_dir=folder, start=start)


@in_virtual_time
async def test_an_environment_host_of_a_lost_node_costs_what_it_held_and_is_replaced(tmp_path):
    cluster = Cluster()
    async with cluster.hosts(1) as start, environments(start, tmp_path) as envs:
        env = await envs.open()
        assert await env.reset(Task(0)) == SEEN
        (node,) = cluster.nodes
        node.lose()
        with pytest.raises(EnvFailure, match="environment host 0 at 10.0.0.1: .* is lost"):
            await env.step("go")
        node.come_back()
        again = await envs.open()
        assert await again.step("go") == SEEN
        with pytest.raises(EnvFailure, match="was lost, and replaced"):
            await env.step("go")
        assert envs.replaced == 1
    assert node.ended
    assert cluster.nodes == [node]
    assert [line.partition(": ")[2] for line in cluster.said] == [
        f"environment hosts and reward processes: 1 on node 1a2b (10.0.0.{n})" for n in range(3)
    ]


@in_virtual_time
async def test_environments_open_where_a_host_is_while_another_waits_for_a_node(tmp_path):
    cluster = Cluster()
    async with cluster.hosts(2) as start, environments(start, tmp_path, count=2) as envs:
        held = [await envs.open() for _ in range(2)]
        cluster.nodes[0].lose()
        for env in held:
            env.close()
        waiting = asyncio.create_task(envs.open())  # the first that goes there
        await cluster.nodes[0].awaited.wait()
        assert not waiting.done()
        began = asyncio.get_running_loop().time()
        for _ in range(5):
            await envs.open()
        assert asyncio.get_running_loop().time() == began
        cluster.nodes[0].come_back()
        await waiting


@in_virtual_time
async def test_a_host_without_a_node_for_minutes_fails_its_episode_and_says_what_it_asks(tmp_path):
    cluster = Cluster()
    async with cluster.hosts(1) as start, environments(start, tmp_path) as envs:
        cluster.nodes[0].lose()
        with pytest.raises(EnvFailure) as failed:
            await envs.open()
        assert re.fullmatch(
            r"environment host 0 has no node after [34]\d\d s: none has room for "
            r"cluster.hosts.cpus=2: ask for less, or add a node",
            str(failed.value),
        )
        cluster.nodes[0].come_back()
        assert await (await envs.open()).reset(Task(0)) == SEEN


@in_virtual_time
async def test_an_explorer_waits_for_room_for_all_that_it_has_and_says_so(tmp_path):
    cluster = Cluster(full=True)
    hosts = cluster.hosts(3)
    entering = asyncio.create_task(hosts.__aenter__())
    await asyncio.sleep(1)
    cluster.nodes[0].come_back()
    await asyncio.sleep(60)
    assert cluster.said == [
        "explorer-0 waits for a node for 2 of its 3 environment hosts and reward processes: Ray "
        "has none with room (cluster.hosts.cpus=2)"
    ]
    for node in cluster.nodes[1:]:
        node.come_back()
    await entering
    assert "3 on node 1a2b" in cluster.said[-1]
    await hosts.__aexit__()


@in_virtual_time
async def test_without_room_for_minutes_it_gives_back_what_it_has(tmp_path):
    cluster = Cluster(full=True)
    entering = asyncio.create_task(cluster.hosts(2).__aenter__())
    await asyncio.sleep(1)
    cluster.nodes[0].come_back()
    with pytest.raises(ClusterFailure, match=r"no node after \d+ s: .* cluster.hosts.cpus=2"):
        await entering
    assert all(node.ended for node in cluster.nodes)


@in_virtual_time
async def test_what_can_not_be_made_on_any_node_is_told_of_at_once(tmp_path):
    class Unmade(FakeHostNode):
        async def place(self):
            raise ProcessEnded(f"{self.name} is no more: its environment can't be set up")

    hosts = FarHosts(lambda name: Unmade(name, {}), of="x", count=2, cpus=1)
    with pytest.raises(ProcessEnded, match="^x-host-0 is no more: its environment can't be set up"):
        await hosts.__aenter__()
    assert asyncio.get_running_loop().time() < 1


@in_virtual_time
async def test_heldout_environments_share_the_cores_of_those_that_train(tmp_path):
    cluster = Cluster()
    async with (
        cluster.hosts(1) as start,
        environments(start, tmp_path) as train,
        environments(start, tmp_path) as heldout,
    ):
        for envs in (train, heldout):
            assert await (await envs.open()).reset(Task(0)) == SEEN
        (node,) = cluster.nodes
        assert len(node.starts[-1][1]) == 2


@in_virtual_time
async def test_a_reward_process_of_a_lost_node_costs_its_episode_and_is_replaced(tmp_path):
    cluster = Cluster()
    async with (
        cluster.hosts(1) as start,
        RewardProcesses("m:f", processes=1, log_dir=tmp_path, start=start) as score,
    ):
        assert await score(TRANSCRIPT, timeout_s=60) == 1
        cluster.nodes[0].lose()
        with pytest.raises(RewardFailure, match="its process was lost: reward 0 at 10.0.0.1"):
            await score(TRANSCRIPT, timeout_s=60)
        cluster.nodes[0].come_back()
        assert await score(TRANSCRIPT, timeout_s=60) == 1


@in_virtual_time
async def test_rewards_without_a_node_are_nothing_that_a_user_got_wrong(tmp_path):
    cluster = Cluster()
    async with cluster.hosts(1) as start:
        cluster.nodes[0].lose()
        with pytest.raises(NodeLost, match="reward 0 has no node after"):
            async with RewardProcesses("m:f", processes=1, log_dir=tmp_path, start=start):
                pass


@in_virtual_time
async def test_whoever_meets_the_end_of_a_far_process_knows_it_at_once():
    class Deaf(FakeHostNode):
        async def wait_dead(self, start, number):
            await asyncio.sleep(1e6)

    node = Deaf("n", {})
    node.starts.append(("s", {}))
    node.lose()
    far = FarProcess("p", node, "s", 0)
    with pytest.raises(NodeLost, match="p: n is lost"):
        await far.call("step")
    assert not far.alive
    assert str(await far.wait_dead()) == "p: n is lost"
    await far.stop()


class Here(HostRole):
    """A role that this process has, as if it were an actor's; `sees`: the explorer's disk."""

    def __init__(self, name, sees=True):
        super().__init__(Place(name, "1a2b", "n1", "127.0.0.1", 1, 1, ()))
        self._sees = sees

    async def start(self, name, number, wanted):
        if not self._sees:
            os.unlink(wanted.log_path)
        sent = pickle.loads(pickle.dumps(wanted))
        return await super().start(name, number, sent)

    def end(self):
        for process in self._processes.values():
            process.kill()


SCRIPTED_ENV = """
import os
import gymnasium

class ScriptedEnv(gymnasium.Env):
    def reset(self, *, seed=None, options=None):
        return os.environ["CUDA_VISIBLE_DEVICES"] + f"{seed} {options}", {"goal": "g"}

    def step(self, action):
        if action == "die":
            print("a last word", flush=True)
            os._exit(3)
        raise RuntimeError("a bug in the environment")
"""


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    (tmp_path / "scripted_env.py").write_text(SCRIPTED_ENV)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    return "scripted_env:ScriptedEnv"


async def test_a_host_of_another_node_answers_raises_and_dies_as_one_of_this(tmp_path, scripted):
    logs = tmp_path / "logs"
    async with (
        FarHosts(Here, of="explorer-0", count=1, cpus=1, say=(said := []).append) as start,
        EnvHosts(scripted, {}, hosts=1, call_timeout_s=60, log_dir=logs, start=start) as envs,
    ):
        env = await envs.open()
        first = await env.reset(Task(7, {"a": 1}))
        assert (first.text, first.info["goal"]) == ("7 {'a': 1}", "g"), "it sees no GPU"
        with pytest.raises(EnvFailure, match="a bug in the environment"):
            await env.step("raise")
        assert envs.replaced == 0
        with pytest.raises(EnvFailure, match="0 at 127.0.0.1 .* exit code 3(?s:.*)a last word"):
            await env.step("die")
        assert (await (await envs.open()).reset(Task(8))).text.startswith("8")
        assert envs.replaced == 1
    assert "a last word" in (logs / "env_host_0.log").read_text()
    assert not any("logs there" in line for line in said)


async def test_logs_of_a_node_that_lacks_the_explorers_disk_are_told_of(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()

    def new(name):
        return Here(name, sees=False)

    async with FarHosts(new, of="x", count=1, cpus=1, say=(said := []).append) as start:
        log = tmp_path / "logs" / "a.log"
        process = await start("no_such_module", name="p", log_path=log, answers=Declared(EnvHost))
        assert "No module named no_such_module" in str(await process.wait_dead())
        with pytest.raises(ProcessEnded):
            await process.call("open", 0)
        await process.stop()
    folder = tmp_path / "tmp" / f"flash-hosts-{os.getuid()}"
    assert said[-1].endswith(f"1 on node 1a2b (127.0.0.1), logs there in {folder}")
    assert [path.name for path in folder.glob("*/*")] == ["a.log"]


def test_how_answers_are_read_is_sent_to_where_they_are_read():
    sent = pickle.loads(pickle.dumps(Declared(EnvHost)))
    answer = written((1, True, SEEN))
    assert sent.read(answer, {1: "reset"}) == (1, True, SEEN)
    with pytest.raises(ValueError, match="Expected"):
        sent.read(answer, {1: "open"})


def test_what_an_explorer_has_elsewhere_is_told_to_its_process_alone(monkeypatch):
    asked = HostsAsked(address="a:1", namespace="n", runtime_env="{}", cpus=2, count=3)
    for name, value in asked.variables.items():
        monkeypatch.setenv(name, value)
    assert HostsAsked.told() == asked
    assert not asked.variables.keys() & os.environ.keys(), "what it starts has no use for it"
    assert HostsAsked.told() is None
