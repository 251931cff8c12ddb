"""Weights over NCCL to explorers' workers: the senders are the controller's, the servers theirs."""

import asyncio
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from aiohttp.test_utils import TestServer
from safetensors.numpy import save_file

from flash.config import load
from flash.errors import ProcessFailure
from flash.explorer.hub import FleetHub
from flash.explorer.senders import Sending
from flash.fakes import FakePool, FakeWires, FakeWorker
from flash.fakes.nccl import FakeNccl, FakeSender, FakeVllm
from flash.hub.http_client import HttpAnswer
from flash.hub.nccl_worker import NcclWorker
from flash.hub.sender import ChunkInfo
from flash.hub.worker import WeightsGone, WorkerBroken, WorkerFailure
from flash.parts.players import sending_of
from flash.system.machine import gpus, has_vllm
from flash.types import Weights
from flash.virtual_time import in_virtual_time
from tests.explorer.fleets import Controller, Explorer, offer, over_a_gate
from tests.explorer.test_fleet import train
from tests.steady import weights

PARTS = ("head", "layer", "norm")


def bytes_of(part, version):
    return f"{part[0]}{version}".encode().ljust(8)


class Sender(FakeSender):
    """Needs no files."""

    seconds_a_chunk = 0.5

    def chunks_of(self, weights, chunk_bytes):
        return [
            (ChunkInfo([part], ["float32"], [[2]]), bytes_of(part, weights.version))
            for part in PARTS
        ]

    async def send(self, number):
        await asyncio.sleep(self.seconds_a_chunk)
        await super().send(number)


class Nccl(FakeNccl):
    def __init__(self):
        super().__init__()
        self.asked = []

    async def start(self, explorer, worker, address):
        """As a fleet asks for it."""
        self.asked.append((explorer, worker, address))
        self.senders.append(Sender(self))
        return self.senders[-1]

    @property
    def living(self):
        return [sender for sender in self.senders if not sender.ended]


class Server(NcclWorker):
    """A worker whose server is called, not asked over HTTP; it has what it is told that it has."""

    def __init__(self, name, nccl, start_sender, **options):
        super().__init__(f"http://{name}", start_sender=start_sender, chunk_bytes=8)
        self.name = name
        self.server = FakeVllm(FakeWorker(name, load_s=(0, 0), **options), nccl)
        worker = self.server.worker
        self.generate, self.abort, self.resume = worker.generate, worker.abort, worker.resume
        self.pause, self.runs = worker.pause, True

    @property
    def dead(self):
        return self.server.worker.dead

    def die(self):
        self.runs = False
        self.server.worker.die()

    def restart(self):
        self.runs = True
        self.server.restart()

    async def set_version(self, version):
        await super().set_version(version)
        assert version <= 0 or self.has(version), self.server.loaded

    def has(self, version):
        return self.server.loaded == {part: bytes_of(part, version) for part in PARTS}

    async def _ask(self, method, route, body, stream=None):
        worker, answer = self.server.worker, {}
        await worker.check_health()
        match route.partition("?")[0]:
            case "/update_weight_version":
                await worker.set_version(int(body["new_version"]))
            case "/weight_info":
                answer = {"weight_version": str(worker.version)}
            case "/health":
                pass
            case "/reset_prefix_cache":
                answer = {"success": True}
            case _:
                try:
                    answer = await self.server.answer(route, msgspec.to_builtins(body))
                except RuntimeError as error:
                    raise WorkerFailure(str(error)) from error
        return HttpAnswer(200, False, msgspec.json.encode(answer))


class NcclExplorer(Explorer):
    by_files = False

    def __init__(self, wires, name, nccl, *, servers=2, **options):
        super().__init__(wires, name, recovery_timeout_s=600, **options)
        self.servers = [
            Server(f"{name} {n}", nccl, self.connection.senders.of(n), seed=n, tokens=(1, 8))
            for n in range(servers)
        ]
        self.pool = FakePool(self.servers, start_s=20.0)


@in_virtual_time
async def test_each_worker_of_each_explorer_is_sent_every_version_by_a_sender_of_its_own():
    wires, nccl = FakeWires(latency_s=(0.01, 0.05)), Nccl()
    controller = Controller(wires)
    async with controller.running(start_sender=nccl.start) as loop:
        explorers = [NcclExplorer(wires, name, nccl).start() for name in "ab"]
        await train(loop, range(1, 6))
        await asyncio.sleep(10)
        for explorer in explorers:
            assert all(server.has(5) for server in explorer.servers)
            assert explorer.pool.deaths == 0
        assert sorted(nccl.asked) == [(e, n, "127.0.0.1") for e in "ab" for n in (0, 1)]
        assert all(len(s.server.init_infos) == 1 for e in explorers for s in e.servers)
        assert len(nccl.living) == 4
        explorers[0].stop.set()
        await explorers[0].task
        await asyncio.sleep(1)
        assert len(nccl.living) == 2
    await asyncio.sleep(1)
    assert not nccl.living


@in_virtual_time
async def test_a_link_that_is_cut_in_a_transfer_costs_that_worker_a_start_and_the_run_no_time():
    wires, nccl = FakeWires(), Nccl()
    controller = Controller(wires)
    async with controller.running(start_sender=nccl.start) as loop:
        a = NcclExplorer(wires, "a", nccl).start()
        b = NcclExplorer(wires, "b", nccl).start()
        await train(loop, [1])
        await asyncio.sleep(10)
        before = nccl.living
        await train(loop, [2])
        await asyncio.sleep(0.6)  # in the first of its chunks
        wires.cut("a")
        await asyncio.sleep(10)
        assert all(server.has(2) for server in b.servers)
        assert len([sender for sender in before if not sender.ended]) == 2  # b's
        await asyncio.sleep(60)
        assert a.pool.deaths == 1
        assert all(server.has(2) for server in a.servers)
        await train(loop, [3, 4])
        await asyncio.sleep(10)
        assert all(server.has(4) for server in (*a.servers, *b.servers))


@in_virtual_time
async def test_a_link_that_is_lost_between_two_versions_costs_nothing():
    wires, nccl = FakeWires(), Nccl()
    controller = Controller(wires)
    async with controller.running(start_sender=nccl.start) as loop:
        a = NcclExplorer(wires, "a", nccl).start()
        for version in range(1, 4):
            await train(loop, [version])
            await asyncio.sleep(10)
            wires.cut()
            await asyncio.sleep(5)
        assert all(server.has(3) for server in a.servers)
        assert (a.pool.deaths, a.hub.stats().retries) == (0, 0)


@in_virtual_time
async def test_an_explorer_that_is_away_delays_nobody_and_its_senders_end_with_its_lease():
    wires, nccl = FakeWires(), Nccl()
    controller = Controller(wires)
    async with controller.running(start_sender=nccl.start, lease_s=20) as loop:
        NcclExplorer(wires, "a", nccl).start()
        b = NcclExplorer(wires, "b", nccl).start()
        await train(loop, [1])
        await asyncio.sleep(10)
        wires.parted_from.add("a")
        began = loop_time()
        await train(loop, [2])
        assert loop_time() - began < 10
        await asyncio.sleep(20)
        assert len(nccl.living) == 2
        assert all(server.has(2) for server in b.servers)


@in_virtual_time
async def test_after_a_controller_that_died_explorers_join_the_senders_of_the_next():
    wires, nccl = FakeWires(), Nccl()
    first = Controller(wires)
    async with first.killed(start_sender=nccl.start) as loop:
        a = NcclExplorer(wires, "a", nccl).start()
        await train(loop, [1])
        await asyncio.sleep(0.6)  # in the first of its chunks
    await asyncio.sleep(1)
    assert not nccl.living
    again = Nccl()
    for server in a.servers:
        server.server._nccl = again
    async with Controller(wires).running(start_sender=again.start, known=1, version=0) as loop:
        await loop.publish(weights(1))
        await asyncio.sleep(60)
        assert all(server.has(1) for server in a.servers)
        await train(loop, [2])
        await asyncio.sleep(10)
        assert all(server.has(2) for server in a.servers)


@in_virtual_time
async def test_a_worker_that_is_started_anew_is_sent_what_the_others_have():
    wires, nccl = FakeWires(), Nccl()
    controller = Controller(wires)
    async with controller.running(start_sender=nccl.start) as loop:
        a = NcclExplorer(wires, "a", nccl).start()
        await train(loop, [1, 2])
        await asyncio.sleep(10)
        a.pool.kill(a.servers[0])
        await asyncio.sleep(40)
        assert all(server.has(2) for server in a.servers)
        assert [len(server.server.init_infos) for server in a.servers] == [2, 1]
        assert len(nccl.living) == 2


@in_virtual_time
async def test_weights_that_are_gone_before_a_slow_explorer_asks_are_left_out():
    wires, nccl = FakeWires(), Nccl()
    controller = Controller(wires, alpha=4)
    async with controller.running(start_sender=nccl.start) as loop:
        a = NcclExplorer(wires, "a", nccl, servers=4).start()
        fast = Explorer(wires, "b").start()
        await train(loop, [1])
        await asyncio.sleep(10)
        for sender in nccl.living:
            sender.seconds_a_chunk = 10
        await train(loop, range(2, 8))
        await asyncio.sleep(1)
        assert fast.hub.version == 7
        assert a.hub.version < 5
        await asyncio.sleep(200)
        assert all(server.has(7) for server in a.servers)
        assert a.pool.deaths == 0  # nothing is wrong with them
        assert len(nccl.senders) == 4


@in_virtual_time
async def test_the_version_before_the_last_can_be_sent_still():
    controller = Controller(FakeWires())
    async with controller.running() as loop:
        for version in (1, 2, 3):
            await loop.publish(weights(version))
            assert controller.hub.weights_of(version) == weights(version)
        assert controller.hub.weights_of(2) == weights(2)
        assert controller.hub.weights_of(1) is None


@pytest.mark.parametrize("seed", range(4))
@in_virtual_time
async def test_whatever_befalls_links_senders_and_servers_each_worker_has_what_it_says(seed):
    rng = random.Random(seed)
    rates = {"lose": 0.01, "double": 0.05, "mix": 0.01, "cut": 0.01, "stall": 0.003}
    wires, nccl = FakeWires(latency_s=(0.001, 0.2), rates=rates, seed=seed), Nccl()
    controller = Controller(wires, alpha=3)
    async with controller.running(start_sender=nccl.start, lease_s=10) as loop:
        explorers = {name: NcclExplorer(wires, name, nccl).start() for name in "abc"}

        async def befall():
            while True:
                await asyncio.sleep(rng.uniform(0, 15))
                name = rng.choice("abc")
                explorer = explorers[name]
                match rng.randrange(4):
                    case 0 if nccl.living:
                        rng.choice(nccl.living).die()
                    case 1:
                        server = rng.choice(explorer.servers)
                        if server.runs and not explorer.task.done():
                            explorer.pool.kill(server)
                    case 2:
                        await explorer.kill()
                        explorers[name] = NcclExplorer(wires, name, nccl).start()
                    case 3:
                        wires.cut(name)

        trouble = asyncio.create_task(befall())
        await train(loop, range(1, 30))
        trouble.cancel()
        wires.rates = {}
        await asyncio.sleep(100)
        await train(loop, [30])
        await asyncio.sleep(100)
        for explorer in explorers.values():
            assert not explorer.task.done(), explorer.task
            assert all(server.has(30) for server in explorer.servers)
        assert len(nccl.living) == 6
    await asyncio.sleep(1)
    assert not nccl.living


async def test_over_a_real_gate_a_server_gets_what_the_controllers_folder_has(tmp_path):
    nccl, asked, files = FakeNccl(), [], {}
    for version in (1, 2):
        files[version] = Weights(version=version, path=tmp_path / str(version))
        files[version].path.mkdir()
        tensors = {f"layer.{n}": np.full((4, 5), n + version, np.float32) for n in range(3)}
        save_file(tensors, files[version].path / "model.safetensors")

    async def start(explorer, worker, address):
        asked.append((explorer, worker, address))
        return await nccl.start_sender()

    async def weights_of(version):
        return files.get(version)

    server = FakeVllm(FakeWorker("server"), nccl)
    sending = Sending(start=start, weights=weights_of)
    async with over_a_gate(sending) as connection, TestServer(server.app()) as served:
        worker = NcclWorker(str(served.make_url("/")), start_sender=connection.senders.of(3))
        await worker.set_version(0)
        for version in (1, 2):  # what the explorer is told of the folder says nothing to it
            await worker.load_weights(Weights(version=version, path=Path("elsewhere")))
            await worker.set_version(version)
            assert server.has(files[version].path)
        assert asked == [("x", 3, "127.0.0.1")]
        with pytest.raises(WeightsGone, match="newer weights than 3"):
            await worker.load_weights(Weights(version=3, path=tmp_path / "1"))
        nccl.senders[0].dies_in_chunk = nccl.senders[0].sent + 1
        with pytest.raises(WorkerBroken, match="sender .pid 1. ended with exit code -9"):
            await worker.load_weights(files[1])
        server.restart()
        await worker.check_health()
        await worker.load_weights(files[1])
        assert server.has(files[1].path)
        await worker.close()
    assert all(sender.ended for sender in nccl.senders)


async def test_what_can_not_be_sent_is_said_in_words():
    async def fails(explorer, worker, address):
        raise ProcessFailure("no interface of this machine has the address 10.0.0.7")

    async def nothing(version):
        return None

    for sending, words in (
        (None, "its engine.transport is disk"),
        (Sending(start=fails, weights=nothing), "could not start it: no interface of this"),
    ):
        async with over_a_gate(sending) as connection:
            sender = await connection.senders.of(0)()
            with pytest.raises(ProcessFailure, match=words):
                await sender.new_id()
            sender.kill()
            with pytest.raises(ProcessFailure, match="its sender with it"):
                await sender.new_id()
    nccl = FakeNccl()

    async def start(explorer, worker, address):
        return await nccl.start_sender()

    async with over_a_gate(Sending(start=start, weights=nothing)) as connection:
        senders = [await connection.senders.of(0)() for _ in range(65)]
        assert len({await sender.new_id() for sender in senders[:-1]}) == 64
        with pytest.raises(ProcessFailure, match="64 senders at a time"):
            await senders[-1].new_id()
        for sender in (senders[0], senders[-1]):
            sender.kill()
        another = await connection.senders.of(0)()
        await another.new_id()
        assert [sender.ended for sender in nccl.senders] == [True] + 64 * [False]


@pytest.mark.slow
@pytest.mark.skipif(bool(gpus()), reason="a sender needs a GPU, and here it is to lack one")
@pytest.mark.parametrize("kind", ["vllm", "sglang"])
async def test_a_runs_senders_are_processes_whose_end_is_told_of(kind, tmp_path, monkeypatch):
    if kind == "vllm" and not has_vllm():
        pytest.skip("vLLM is not installed: make setup-vllm")
    monkeypatch.setattr("flash.system.machine.has_sglang", lambda: True)
    config = load("frozen_lake", {"engine.transport": "nccl", "engine.kind": kind})
    hub = FleetHub(None, version=4, offer=offer)
    first = Weights(version=4, path=tmp_path)
    sending = sending_of(config, hub, tmp_path / "logs", first)
    assert await sending.weights(4) == first
    assert await sending.weights(5) is None
    sender = await sending.start("a/../b", 2, "127.0.0.1")
    with pytest.raises(ProcessFailure, match="ended with exit code 1.*sender_a_.._b_2.log"):
        await sender.new_id()
    assert "set_device" in (tmp_path / "logs" / "sender_a_.._b_2.log").read_text()
    sender.kill()
    await sender.stop()
    with pytest.raises(ProcessFailure, match=r"no interface of this machine has the address 192\."):
        await sending.start("a", 0, "192.0.2.1")
    assert sending_of(load("frozen_lake"), hub, tmp_path, first) is None


def loop_time():
    return asyncio.get_running_loop().time()
