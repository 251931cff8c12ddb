"""Weights over NCCL without NCCL: packed in earnest, for servers that receive as vLLM's do.

The wire between the two is a queue in this process; as with NCCL, each side waits for the other.
"""

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from aiohttp.test_utils import TestServer
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash.errors import ProcessFailure
from flash.fakes import FakeWorker, worker_app
from flash.fakes.nccl import Chunk, FakeNccl, FakeSender, FakeVllm
from flash.hub.hub import InferenceHub
from flash.hub.nccl_worker import NcclWorker
from flash.hub.sender import ChunkInfo, listening_at
from flash.hub.worker import WeightsGone, WorkerBroken, WorkerFailure
from flash.trainer.delta import write_delta
from flash.trainer.sender import Sender
from flash.types import GenerateRequest, SamplingParams, Weights

CHUNK_BYTES = 100
RANKS = 2  # of a server


class Packing(FakeSender):
    """A sender's process that packs as the real one does."""

    device = torch.device("cpu")

    def chunks_of(self, weights: Weights, chunk_bytes: int) -> list[Chunk]:
        sender, self._packed = Sender(self), []
        try:
            infos = sender.open(str(weights.path), chunk_bytes)
        except ValueError as error:
            raise ProcessFailure(f"sender raised:\n{error!r}") from error
        for number in range(len(infos)):
            sender.send(number)
        return [
            (ChunkInfo(**info), packed) for info, packed in zip(infos, self._packed, strict=True)
        ]

    def broadcast(self, packed: Tensor) -> None:
        self._packed.append(packed.numpy().tobytes())


class Nccl(FakeNccl):
    async def start_sender(self) -> FakeSender:
        self.senders.append(Packing(self))
        return self.senders[-1]


class Setting:
    """Servers and their clients; the senders in the order in which they were started."""

    def __init__(self) -> None:
        self.nccl = Nccl(ranks=RANKS)
        self.senders = self.nccl.senders
        self.servers: list[FakeVllm] = []
        self.clients: list[NcclWorker] = []
        self._running: list[TestServer] = []

    async def add(self) -> tuple[FakeVllm, NcclWorker]:
        worker = FakeWorker(f"server {len(self.servers)}", load_s=(0.0, 0.0))
        server = FakeVllm(worker, self.nccl)
        running = TestServer(server.app())
        await running.start_server()
        client = NcclWorker(
            str(running.make_url("/")),
            start_sender=self.nccl.start_sender,
            chunk_bytes=CHUNK_BYTES,
            takes_deltas=True,
        )
        self.servers.append(server)
        self.clients.append(client)
        self._running.append(running)
        return server, client

    async def close(self) -> None:
        for client in self.clients:
            await client.close()
        for running in self._running:
            await running.close()


@pytest.fixture
async def setting():
    made = Setting()
    yield made
    await made.close()


@pytest.fixture
def export(tmp_path) -> Callable[[int], Path]:
    """A directory of a version's weights: three chunks."""

    def make(version: int) -> Path:
        directory = tmp_path / f"version_{version}"
        directory.mkdir()
        tensors = {f"layer.{n}.weight": torch.randn(5, 5) for n in range(3)}
        save_file(tensors, directory / "model.safetensors")
        return directory

    return make


def of(directory: Path, version: int = 1) -> Weights:
    return Weights(version=version, path=directory)


async def test_a_group_is_formed_once_and_then_serves_every_update(setting, export):
    server, client = await setting.add()
    await client.set_version(0)
    server.asked.clear()
    first, second = export(1), export(2)

    await client.load_weights(of(first))
    update = ["/start_weight_update", *["/update_weights"] * 3, "/finish_weight_update"]
    join = ["/get_world_size", "/shutdown_weight_transfer_engine", "/init_weight_transfer_engine"]
    assert server.asked == ["/weight_info", *join, *update]
    assert server.has(first)
    (info,) = server.init_infos
    assert len(base64.b64decode(info.pop("nccl_unique_id_b64"))) == 128
    assert info == {
        "rank_offset": 1, "world_size": 1 + RANKS, "packed": True,
        "packed_buffer_size_bytes": CHUNK_BYTES, "packed_num_buffers": 1,
    }  # fmt: skip

    await client.set_version(1)
    server.asked.clear()
    await client.load_weights(of(second))
    assert server.asked == ["/weight_info", *update]
    assert server.has(second)
    assert len(setting.senders) == 1


async def test_a_server_that_was_started_anew_gets_a_group_of_its_own(setting, export):
    server, client = await setting.add()
    await client.set_version(0)
    await client.load_weights(of(export(1)))
    await client.set_version(1)
    server.restart()
    await client.check_health()
    await client.load_weights(of(again := export(2)))
    assert server.has(again)
    assert [sender.ended for sender in setting.senders] == [True, False]


async def test_a_server_that_fails_in_an_update_is_broken_until_it_is_started_anew(setting, export):
    server, client = await setting.add()
    await client.set_version(4)
    server.fails_in_update = 2
    with pytest.raises(WorkerBroken, match="out of memory"):
        await client.load_weights(of(export(5)))
    assert setting.senders[0].ended
    for _ in range(2):
        with pytest.raises(WorkerBroken, match="broke off"):
            await client.check_health()
    server.restart()
    await client.check_health()
    await client.load_weights(of(again := export(6)))
    assert server.has(again)


async def test_a_server_that_fails_in_its_first_update_after_a_start_is_not_taken_for_a_new_one(
    setting, export
):
    server, client = await setting.add()
    await client.set_version(4)
    await client.load_weights(of(export(4)))
    server.restart()
    await client.check_health()
    server.fails_in_update = server.updates + 2
    with pytest.raises(WorkerBroken, match="out of memory"):
        await client.load_weights(of(export(5)))
    with pytest.raises(WorkerBroken, match="broke off"):
        await client.check_health()
    server.restart()
    await client.check_health()
    await client.load_weights(of(again := export(6)))
    assert server.has(again)


async def test_one_that_was_never_told_a_version_is_known_again_too(setting, export):
    server, client = await setting.add()
    server.fails_in_update = 2
    with pytest.raises(WorkerBroken):
        await client.load_weights(of(export(1)))
    with pytest.raises(WorkerBroken, match="broke off"):
        await client.check_health()
    server.restart()
    await client.check_health()


async def test_a_sender_that_dies_in_an_update_leaves_nobody_waiting(setting, export):
    _, client = await setting.add()
    await client.set_version(0)
    setting.senders[0].dies_in_chunk = 1
    with pytest.raises(WorkerBroken, match="sent its weights: sender .pid 1. ended"):
        await client.load_weights(of(export(1)))
    with pytest.raises(WorkerBroken, match="broke off"):
        await client.check_health()


async def test_weights_that_were_replaced_meanwhile_spoil_nothing(setting, export, tmp_path):
    server, client = await setting.add()
    await client.set_version(0)
    with pytest.raises(WorkerFailure, match="were these weights replaced already") as caught:
        await client.load_weights(of(tmp_path / "gone"))
    assert not isinstance(caught.value, WorkerBroken)
    await client.check_health()
    await client.load_weights(of(there := export(1)))
    assert server.has(there)


async def test_a_sender_that_ended_since_the_last_update_is_replaced_and_costs_nothing(
    setting, export
):
    server, client = await setting.add()
    await client.set_version(0)
    await client.load_weights(of(export(1)))
    await client.set_version(1)
    setting.senders[0].die()
    await client.load_weights(of(again := export(2)))
    assert server.has(again)
    await client.check_health()
    assert [sender.ended for sender in setting.senders] == [True, False]


async def test_weights_that_are_not_to_be_had_any_more_cost_the_server_nothing(setting, export):
    server, client = await setting.add()
    await client.set_version(0)
    await client.load_weights(of(first := export(1)))
    await client.set_version(1)
    setting.senders[0].open = nothing
    server.asked.clear()
    with pytest.raises(WeightsGone, match="newer weights than 2"):
        await client.load_weights(of(export(2), 2))
    assert server.asked == ["/weight_info"]
    await client.check_health()
    assert server.has(first)
    assert [sender.ended for sender in setting.senders] == [False]


async def nothing(weights, chunk_bytes, *, delta):
    return None


@pytest.fixture
def step(export) -> Callable[[Path, int], Path]:
    """A directory of the weights after those, a few of which have changed."""

    def make(before: Path, version: int) -> Path:
        after = export(version)
        tensors = load_file(before / "model.safetensors")
        for name in list(tensors)[:2]:
            tensors[name].view(-1)[version % 25] += 1
        save_file(tensors, after / "model.safetensors")
        write_delta(before, after)
        return after

    return make


BEGIN, RECEIVE, FINISH = (f"{what}_flash_delta" for what in ("begin", "receive", "finish"))


async def test_what_changed_is_sent_alone_and_both_have_all_of_it_then(setting, export, step):
    server, client = await setting.add()
    await client.set_version(0)
    await client.load_weights(of(folder := export(1)))
    for version in (2, 3):
        await client.set_version(version - 1)
        server.asked.clear()
        await client.load_weights(of(folder := step(folder, version)))
        assert server.asked == ["/weight_info", BEGIN, RECEIVE, FINISH]
        assert server.has(folder)
    await client.check_health()
    assert len(setting.senders) == 1


async def test_a_server_that_was_started_anew_is_sent_all_and_then_what_changes(
    setting, export, step
):
    server, client = await setting.add()
    await client.set_version(0)
    await client.load_weights(of(folder := export(1)))
    await client.set_version(1)
    server.restart()
    await client.load_weights(of(folder := step(folder, 2)))
    assert BEGIN not in server.asked
    assert server.has(folder)
    await client.set_version(2)
    await client.load_weights(of(folder := step(folder, 3)))
    assert server.asked[-1] == FINISH
    assert server.has(folder)


@pytest.mark.parametrize("loses", [True, False])
async def test_a_server_that_takes_no_delta_is_sent_all_by_the_same_group(
    setting, export, step, loses, caplog
):
    server, client = await setting.add()
    await client.set_version(0)
    await client.load_weights(of(folder := export(1)))
    await client.set_version(1)
    server.refuses_deltas, server.loses = not loses, "layer.1.weight" if loses else ""
    server.asked.clear()
    await client.load_weights(of(folder := step(folder, 2)))
    assert server.asked[1] == BEGIN
    assert (FINISH in server.asked) is loses
    assert server.has(folder)
    assert "whole weights from now on" in caplog.text
    await client.check_health()
    await client.set_version(2)
    await client.load_weights(of(folder := step(folder, 3)))
    assert server.asked.count(BEGIN) == 1
    assert server.has(folder)
    assert len(setting.senders) == 1


async def test_a_delta_that_breaks_off_leaves_a_broken_server_and_nobody_waiting(
    setting, export, step
):
    server, client = await setting.add()
    await client.set_version(0)
    await client.load_weights(of(folder := export(1)))
    await client.set_version(1)
    server.fails_in_update = server.updates + 1
    with pytest.raises(WorkerBroken, match="out of memory"):
        await client.load_weights(of(folder := step(folder, 2)))
    assert setting.senders[0].ended
    with pytest.raises(WorkerBroken, match="broke off"):
        await client.check_health()
    server.restart()
    await client.check_health()
    await client.load_weights(of(folder))
    assert server.has(folder)


async def test_a_server_without_weight_transfer_is_told_how_to_be_started(setting, export):
    async with TestServer(worker_app(FakeWorker("plain"))) as plain:
        url = str(plain.make_url("/"))
        client = NcclWorker(url, start_sender=setting.nccl.start_sender)
        with pytest.raises(WorkerFailure, match='--weight-transfer-config .{"backend": "nccl"}'):
            await client.load_weights(of(export(1)))
        await client.close()


async def test_an_update_that_is_called_off_kills_the_sender_that_waits(setting, export):
    server, client = await setting.add()
    await client.set_version(0)
    server.hangs_in_update = 2
    load = asyncio.create_task(client.load_weights(of(export(1))))
    await server.hangs.wait()
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert setting.senders[0].ended


async def test_a_hung_server_costs_neither_the_others_nor_the_publish(setting, export):
    """And returns with what was published, whatever was exported after that."""
    for _ in range(3):
        await setting.add()
    hung, *others = setting.servers
    hung.hangs_in_update = 2
    async with InferenceHub(setting.clients) as hub:
        published = export(1)
        publish = asyncio.create_task(hub.publish(Weights(version=1, path=published)))
        await hung.hangs.wait()
        hub._slots[0].expire_calls()
        report = await publish
        assert [worker.updated for worker in report.per_worker] == [False, True, True]
        assert all(server.has(published) for server in others)
        export(2)  # the trainer steps on

        hung.restart()
        while not hub.stats().workers[0].healthy:
            await asyncio.sleep(0.01)
        assert hung.has(published)
        sampling = SamplingParams(max_tokens=3)
        answers = await asyncio.gather(
            *(hub.generate(GenerateRequest(token_ids=[1], sampling=sampling)) for _ in range(9))
        )
        assert len({answer.worker for answer in answers}) == 3
        assert {v for answer in answers for v in answer.versions} == {1}


def test_senders_listen_where_they_can_be_reached_and_on_loopback_nowhere_else(monkeypatch):
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    other = [("eth0", "10.1.2.3"), ("eth1", "fe80::1%eth1"), ("lo", "127.0.0.1"), ("lo", "::1")]

    class Address:
        def __init__(self, address):
            self.address = address

    found = {}
    for name, address in other:
        found.setdefault(name, [Address("02:42:ac:11:00:02")]).append(Address(address))
    monkeypatch.setattr("psutil.net_if_addrs", lambda: found)
    for address, interface, family in [
        ("127.0.0.1", "lo", "AF_INET"),
        ("127.0.0.7", "lo", "AF_INET"),
        ("::1", "lo", "AF_INET6"),
        ("10.1.2.3", "eth0", "AF_INET"),
        ("::ffff:10.1.2.3", "eth0", "AF_INET"),
        ("fe80::1%eth1", "eth1", "AF_INET6"),
    ]:
        wanted = {"NCCL_SOCKET_IFNAME": f"={interface}", "NCCL_SOCKET_FAMILY": family}
        assert listening_at(address) == wanted
    for address in ("10.9.9.9", "", "a name"):
        with pytest.raises(ProcessFailure, match="address"):
            listening_at(address)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    assert listening_at("10.1.2.3") == {}
    assert listening_at("127.0.0.1")["NCCL_SOCKET_IFNAME"] == "=lo"
