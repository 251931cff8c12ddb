"""Weights over NCCL without NCCL: real senders, and servers that receive as vLLM's do.

The wire between the two is a queue in this process; as with NCCL, each side waits for the other.
"""

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from safetensors.torch import load_file, save_file
from torch import Tensor

from flash.errors import ProcessFailure
from flash.fakes import FakeWorker, worker_app
from flash.hub.hub import InferenceHub
from flash.hub.nccl_worker import NcclWorker
from flash.hub.worker import WorkerBroken, WorkerFailure
from flash.trainer.sender import Sender
from flash.types import GenerateRequest, SamplingParams, Weights

CHUNK_BYTES = 100
RANKS = 2  # of a server


class Wire:
    """What one group shares: everyone is there before anyone goes on, and each chunk is awaited."""

    def __init__(self) -> None:
        self.meeting = asyncio.Barrier(2)
        self._chunks: asyncio.Queue[tuple[Tensor, asyncio.Event]] = asyncio.Queue(maxsize=1)

    async def send(self, packed: Tensor) -> None:
        received = asyncio.Event()
        await self._chunks.put((packed, received))
        await received.wait()

    async def receive(self) -> Tensor:
        packed, received = await self._chunks.get()
        received.set()
        return packed


class FakeSender:
    """A sender's process: it answers calls, hangs in a broadcast, dies."""

    device = torch.device("cpu")

    def __init__(self, wires: dict[bytes, Wire]) -> None:
        self.killed = False
        self.sent = 0
        self.dies_in_chunk = -1
        self._wires = wires
        self._sender = Sender(self)
        self._packed: Tensor | None = None

    # what the Sender calls
    def new_id(self) -> bytes:
        return str(len(self._wires)).encode().ljust(128)

    def join(self, group_id: bytes, size: int) -> None:
        assert size == 1 + RANKS
        self._wire = self._wires.setdefault(group_id, Wire())

    def broadcast(self, packed: Tensor) -> None:
        self._packed = packed

    # what the worker calls
    async def call(self, method: str, *args: Any) -> Any:
        assert not self.killed
        try:
            answer = getattr(self._sender, method)(*args)
        except ValueError as error:
            raise ProcessFailure(f"sender raised:\n{error!r}") from error
        if method == "join":
            await self._wire.meeting.wait()
        if method == "send":
            if self.sent == self.dies_in_chunk:
                raise ProcessFailure("sender (pid 1) ended with exit code -9")
            self.sent += 1
            assert self._packed is not None
            await self._wire.send(self._packed)
        return answer

    def kill(self) -> None:
        self.killed = True

    async def stop(self) -> None:
        assert self.killed


class FakeVllm:
    """A server with the routes of vLLM's weight transfer, and what they insist on."""

    def __init__(self, name: str, wires: dict[bytes, Wire]) -> None:
        self.worker = FakeWorker(name, load_s=(0.0, 0.0))
        self.asked: list[str] = []
        self.init_infos: list[dict[str, Any]] = []
        self.loaded: dict[str, Tensor] = {}
        self.updates = 0
        self.fails_in_update = -1
        self.hangs = asyncio.Event()  # set once an update hangs, if `hangs_in_update`
        self.hangs_in_update = -1
        self._wires = wires
        self._wire: Wire | None = None
        self._active = False
        self.app = worker_app(self.worker)
        self.app.middlewares.append(self._record)
        for route, handler in {
            "/init_weight_transfer_engine": self._init,
            "/shutdown_weight_transfer_engine": self._shutdown,
            "/start_weight_update": self._start,
            "/update_weights": self._update,
            "/finish_weight_update": self._finish,
        }.items():
            self.app.router.add_post(route, handler)
        self.app.router.add_get("/get_world_size", self._world_size)

    def restart(self) -> None:
        """As its pool does: all that it knew is gone."""
        self.worker.restart(version=-7)
        self._wire, self._active, self.loaded = None, False, {}

    @web.middleware
    async def _record(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked.append(request.path)
        try:
            response: web.StreamResponse = await handler(request)
        except RuntimeError as error:
            return web.json_response({"error": str(error)}, status=500)
        return response

    async def _world_size(self, request: web.Request) -> web.Response:
        return web.json_response({"world_size": RANKS})

    async def _init(self, request: web.Request) -> web.Response:
        info = (await request.json())["init_info"]
        self.init_infos.append(info)
        group_id = base64.b64decode(info["nccl_unique_id_b64"], validate=True)
        self._wire = self._wires.setdefault(group_id, Wire())
        await self._wire.meeting.wait()
        return web.json_response({})

    async def _shutdown(self, request: web.Request) -> web.Response:
        self._wire = None
        return web.json_response({})

    async def _start(self, request: web.Request) -> web.Response:
        if self._active:
            raise RuntimeError("an update is already active")
        self._active = True
        return web.json_response({})

    async def _update(self, request: web.Request) -> web.Response:
        if self._wire is None or not self._active:
            raise RuntimeError("not initialized, or not started")
        self.updates += 1
        if self.updates == self.fails_in_update:
            raise RuntimeError("out of memory")
        if self.updates == self.hangs_in_update:
            self.hangs.set()
            await asyncio.Event().wait()
        update = (await request.json())["update_info"]
        packed = await self._wire.receive()
        start = 0
        for name, dtype_name, shape in zip(
            update["names"], update["dtype_names"], update["shapes"], strict=True
        ):
            dtype = getattr(torch, dtype_name)
            end = start + torch.Size(shape).numel() * dtype.itemsize
            self.loaded[name] = packed[start:end].view(dtype).view(shape)
            start = end
        assert start == packed.numel()
        return web.json_response({})

    async def _finish(self, request: web.Request) -> web.Response:
        if not self._active:
            raise RuntimeError("no update to finish")
        self._active = False
        return web.json_response({})


class Setting:
    """Servers and their clients; the senders in the order in which they were started."""

    def __init__(self) -> None:
        self.wires: dict[bytes, Wire] = {}
        self.senders: list[FakeSender] = []
        self.servers: list[FakeVllm] = []
        self.clients: list[NcclWorker] = []
        self._running: list[TestServer] = []

    async def add(self) -> tuple[FakeVllm, NcclWorker]:
        server = FakeVllm(f"server {len(self.servers)}", self.wires)
        running = TestServer(server.app)
        await running.start_server()
        client = NcclWorker(
            str(running.make_url("/")), start_sender=self._start, chunk_bytes=CHUNK_BYTES
        )
        self.servers.append(server)
        self.clients.append(client)
        self._running.append(running)
        return server, client

    async def _start(self) -> FakeSender:
        self.senders.append(FakeSender(self.wires))
        return self.senders[-1]

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


def has(server: FakeVllm, directory: Path) -> bool:
    wanted = load_file(directory / "model.safetensors")
    return server.loaded.keys() == wanted.keys() and all(
        torch.equal(server.loaded[name], tensor) for name, tensor in wanted.items()
    )


async def test_a_group_is_formed_once_and_then_serves_every_update(setting, export):
    server, client = await setting.add()
    await client.set_version(0)
    server.asked.clear()
    first, second = export(1), export(2)

    await client.load_weights(first)
    update = ["/start_weight_update", *["/update_weights"] * 3, "/finish_weight_update"]
    forget = ["/reset_prefix_cache"]
    join = ["/get_world_size", "/shutdown_weight_transfer_engine", "/init_weight_transfer_engine"]
    assert server.asked == [*join, *update, *forget]
    assert has(server, first)
    (info,) = server.init_infos
    assert len(base64.b64decode(info.pop("nccl_unique_id_b64"))) == 128
    assert info == {
        "rank_offset": 1, "world_size": 1 + RANKS, "packed": True,
        "packed_buffer_size_bytes": CHUNK_BYTES, "packed_num_buffers": 1,
    }  # fmt: skip

    await client.set_version(1)
    server.asked.clear()
    await client.load_weights(second)
    assert server.asked == ["/weight_info", *update, *forget]
    assert has(server, second)
    assert len(setting.senders) == 1


async def test_a_server_that_was_started_anew_gets_a_group_of_its_own(setting, export):
    server, client = await setting.add()
    await client.set_version(0)
    await client.load_weights(export(1))
    await client.set_version(1)
    server.restart()
    await client.check_health()
    await client.load_weights(again := export(2))
    assert has(server, again)
    assert [sender.killed for sender in setting.senders] == [True, False]


async def test_a_server_that_fails_in_an_update_is_broken_until_it_is_started_anew(setting, export):
    server, client = await setting.add()
    await client.set_version(4)
    server.fails_in_update = 2
    with pytest.raises(WorkerBroken, match="out of memory"):
        await client.load_weights(export(5))
    assert setting.senders[0].killed
    for _ in range(2):
        with pytest.raises(WorkerBroken, match="broke off"):
            await client.check_health()
    server.restart()
    await client.check_health()
    await client.load_weights(again := export(6))
    assert has(server, again)


async def test_one_that_was_never_told_a_version_is_known_again_too(setting, export):
    server, client = await setting.add()
    server.fails_in_update = 2
    with pytest.raises(WorkerBroken):
        await client.load_weights(export(1))
    with pytest.raises(WorkerBroken, match="broke off"):
        await client.check_health()
    server.restart()
    await client.check_health()


async def test_a_sender_that_dies_in_an_update_leaves_nobody_waiting(setting, export):
    _, client = await setting.add()
    await client.set_version(0)
    setting.senders[0].dies_in_chunk = 1
    with pytest.raises(WorkerBroken, match="sent its weights: sender .pid 1. ended"):
        await client.load_weights(export(1))
    with pytest.raises(WorkerBroken, match="broke off"):
        await client.check_health()


async def test_weights_that_were_replaced_meanwhile_spoil_nothing(setting, export, tmp_path):
    server, client = await setting.add()
    await client.set_version(0)
    with pytest.raises(WorkerFailure, match="were these weights replaced already") as caught:
        await client.load_weights(tmp_path / "gone")
    assert not isinstance(caught.value, WorkerBroken)
    await client.check_health()
    await client.load_weights(there := export(1))
    assert has(server, there)


async def test_a_server_without_weight_transfer_is_told_how_to_be_started(setting, export):
    async with TestServer(worker_app(FakeWorker("plain"))) as plain:
        url = str(plain.make_url("/"))
        client = NcclWorker(url, start_sender=setting._start)
        with pytest.raises(WorkerFailure, match='--weight-transfer-config .{"backend": "nccl"}'):
            await client.load_weights(export(1))
        await client.close()


async def test_an_update_that_is_called_off_kills_the_sender_that_waits(setting, export):
    server, client = await setting.add()
    await client.set_version(0)
    server.hangs_in_update = 2
    load = asyncio.create_task(client.load_weights(export(1)))
    await server.hangs.wait()
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert setting.senders[0].killed


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
        assert all(has(server, published) for server in others)
        export(2)  # the trainer steps on

        hung.restart()
        while not hub.stats().workers[0].healthy:
            await asyncio.sleep(0.01)
        assert has(hung, published)
        sampling = SamplingParams(max_tokens=3)
        answers = await asyncio.gather(
            *(hub.generate(GenerateRequest(token_ids=[1], sampling=sampling)) for _ in range(9))
        )
        assert len({answer.worker for answer in answers}) == 3
        assert {v for answer in answers for v in answer.versions} == {1}
