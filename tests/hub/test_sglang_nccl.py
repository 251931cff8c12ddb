"""Weights to SGLang servers by a group, in earnest: sending processes, and gloo in NCCL's place.

The servers are fakes with SGLang's routes, whose ranks join the group and receive.
"""

import asyncio
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from safetensors.torch import load_file, save_file

from flash.errors import ProcessFailure
from flash.fakes import FakeSglang, FakeWorker
from flash.fakes.nccl import FakeNccl
from flash.hub.hub import InferenceHub
from flash.hub.sender import LocalSender, StartSender, address_towards
from flash.hub.sglang_nccl import SglangNcclPool, SglangNcclWorker
from flash.hub.worker import WorkerBroken, WorkerFailure
from flash.system.process import Child
from flash.types import GenerateRequest, SamplingParams, Weights
from flash.warm_start.small_policy import create
from tests.hub.test_vllm import PROMPT, logprobs, request, weights

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

PLANTED = Path(__file__).parent / "planted_sglang"
CHUNK_BYTES = 100
RANKS = 2  # of a server
CHUNKS = 4
SERVER_INFO, MODEL_INFO = "/server_info", "/model_info"
JOIN = [SERVER_INFO, "/destroy_weights_update_group", "/init_weights_update_group"]
UPDATE = [
    "/begin_weight_update", *["/update_weights_from_distributed"] * CHUNKS, "/end_weight_update",
]  # fmt: skip


class Keeping(FakeWorker):
    """It keeps what was in the last folder that it loaded."""

    has: dict[str, torch.Tensor]

    async def load_weights(self, weights: Weights) -> None:
        self.has = load_file(weights.path / "model.safetensors")
        await super().load_weights(weights)


class Sender(LocalSender):
    """A process that sends. It dies as it is to send the chunk of that number."""

    def __init__(self, child: Child) -> None:
        super().__init__(child)
        self.process = psutil.Process(child.pid)
        self.dies_in_chunk = -1

    async def die(self) -> None:
        """All of it, at once: when its guard is killed, the rest is ended a moment later."""
        guarded = self.process.children(recursive=True)
        self.process.kill()
        _, left = await asyncio.to_thread(psutil.wait_procs, guarded, timeout=60)
        assert not left

    @classmethod
    async def start(cls, log: Path) -> "Sender":
        module = "flash.trainer.process_group"
        return cls(await Child.start(module, "cpu", "127.0.0.1", name="sender", log_path=log))

    async def send(self, number: int) -> None:
        if number == self.dies_in_chunk:
            await self.die()
        await super().send(number)


class Setting:
    """Servers and their clients; the senders in the order in which they were started."""

    def __init__(self, folder: Path) -> None:
        self.senders: list[Sender] = []
        self.servers: list[FakeSglang] = []
        self.clients: list[SglangNcclWorker] = []
        self._running: list[TestServer] = []
        self._folder = folder

    async def add(self, **options) -> tuple[FakeSglang, SglangNcclWorker]:
        worker = Keeping(f"server {len(self.servers)}", load_s=(0.0, 0.0), **options)
        server = FakeSglang(worker, tp_size=RANKS, overlap=False)
        running = TestServer(server.app())
        await running.start_server()
        client = SglangNcclWorker(
            str(running.make_url("/")), start_sender=self.start_sender, chunk_bytes=CHUNK_BYTES
        )
        self.servers.append(server)
        self.clients.append(client)
        self._running.append(running)
        return server, client

    async def start_sender(self) -> Sender:
        self.senders.append(await Sender.start(self._folder / "sender.log"))
        return self.senders[-1]

    async def close(self) -> None:
        for client in self.clients:
            await client.close()
        for running in self._running:
            await running.close()
        assert not any(sender.process.is_running() for sender in self.senders)


@pytest.fixture
async def setting(tmp_path):
    made = Setting(tmp_path)
    yield made
    await made.close()


@pytest.fixture
def export(tmp_path) -> Callable[[int], Path]:
    """A directory of a version's weights: four chunks, of two dtypes."""

    def make(version: int) -> Path:
        directory = tmp_path / f"version_{version}"
        directory.mkdir()
        tensors = {f"layer.{n}.weight": torch.randn(5, 5) for n in range(3)}
        tensors["head.weight"] = torch.randn(7, 3).to(torch.bfloat16)
        tensors["head.scale"] = torch.randn(()).to(torch.bfloat16)
        save_file(tensors, directory / "model.safetensors")
        return directory

    return make


def of(directory: Path, version: int = 1) -> Weights:
    return Weights(version=version, path=directory)


def has(server: FakeSglang, directory: Path) -> bool:
    """Whether it was given all of these weights, and nothing else."""
    wanted = load_file(directory / "model.safetensors")
    return server.worker.has.keys() == wanted.keys() and all(
        torch.equal(tensor, wanted[name]) and tensor.dtype == wanted[name].dtype
        for name, tensor in server.worker.has.items()
    )


def routes(server: FakeSglang) -> list[str]:
    return [route for route, _ in server.asked]


async def test_a_group_is_formed_once_and_then_serves_every_update(setting, export):
    server, client = await setting.add()
    await client.set_version(0)
    server.asked.clear()
    await client.load_weights(of(first := export(1)))
    assert routes(server) == [MODEL_INFO, *JOIN, *UPDATE]
    assert has(server, first)
    bodies = dict(server.asked)
    init = bodies["/init_weights_update_group"]
    assert 0 < init.pop("master_port") < 1 << 16
    assert init == {
        "master_address": "127.0.0.1", "rank_offset": 1, "world_size": 1 + RANKS,
        "group_name": "flash", "backend": "gloo",
    }  # fmt: skip
    updates = [body for route, body in server.asked if route == UPDATE[1]]
    assert [update.pop("flush_cache") for update in updates] == [False, False, False, True]
    assert [update.pop("names") for update in updates] == [
        *([f"layer.{n}.weight"] for n in range(3)), ["head.scale", "head.weight"],
    ]  # fmt: skip
    assert [update.pop("dtypes") for update in updates] == [*[["float32"]] * 3, ["bfloat16"] * 2]
    assert [update.pop("shapes") for update in updates] == [*[[[5, 5]]] * 3, [[], [7, 3]]]
    assert updates == [{"group_name": "flash", "load_format": "flattened_bucket"}] * CHUNKS

    await client.set_version(1)
    server.asked.clear()
    await client.load_weights(of(second := export(2)))
    assert routes(server) == [MODEL_INFO, *UPDATE]
    assert has(server, second)
    assert len(setting.senders) == 1


@pytest.mark.parametrize("mode", ["keep", "keep_stale_kv"])
async def test_each_token_has_the_version_that_sampled_it(mode, setting, export):
    server, client = await setting.add(token_s=(0.0005, 0.0005), tokens=(10**6, 10**6))
    async with InferenceHub([client], update_mode=mode, max_running=4) as hub:
        request = GenerateRequest(token_ids=[1], sampling=SamplingParams(max_tokens=100))
        calls = [asyncio.ensure_future(hub.generate(request)) for _ in range(3)]
        while server.worker.running < 3:
            await asyncio.sleep(0)
        server.asked.clear()
        report = await hub.publish(of(published := export(1)))
        answers = await asyncio.gather(*calls)
        later = await hub.generate(request)
    assert report.workers == 1
    assert has(server, published)
    flushed = [body["flush_cache"] for route, body in server.asked if route == UPDATE[1]]
    assert flushed == [False] * (CHUNKS - 1) + [mode != "keep_stale_kv"]
    assert server.worker.recomputed == (mode != "keep_stale_kv")
    for completion in answers:
        assert len(completion.token_ids) == 100
        assert completion.versions == sorted(completion.versions)
        assert completion.versions[-1] == 1
    assert later.versions == [1] * 100


async def test_a_server_that_was_started_anew_gets_a_group_of_its_own(setting, export):
    server, client = await setting.add()
    await client.set_version(0)
    await client.load_weights(of(export(1)))
    await client.set_version(1)
    server.restart()
    await client.check_health()
    server.asked.clear()
    await client.load_weights(of(again := export(2)))
    assert routes(server)[-len(JOIN + UPDATE) :] == JOIN + UPDATE
    assert has(server, again)
    first, second = setting.senders
    assert not first.process.is_running()
    assert second.process.is_running()


async def test_a_server_that_fails_in_an_update_is_broken_until_it_is_started_anew(setting, export):
    server, client = await setting.add()
    await client.set_version(4)
    server.ranks.fails_in_update = 2
    with pytest.raises(WorkerBroken, match="out of memory"):
        await client.load_weights(of(export(5)))
    assert not setting.senders[0].process.is_running()
    for _ in range(2):
        with pytest.raises(WorkerBroken, match="broke off"):
            await client.check_health()
    server.restart()
    await client.check_health()
    await client.load_weights(of(again := export(6)))
    assert has(server, again)


async def test_a_sender_that_dies_in_an_update_leaves_nobody_waiting(setting, export):
    server, client = await setting.add()
    await client.set_version(0)
    setting.senders[0].dies_in_chunk = 2
    with pytest.raises(WorkerBroken, match="Failed to receive weights|can't be sent its weights"):
        await client.load_weights(of(export(1)))
    with pytest.raises(WorkerBroken, match="broke off"):
        await client.check_health()
    assert not hasattr(server.worker, "has")


async def test_a_sender_that_ended_since_the_last_update_is_replaced_and_costs_nothing(
    setting, export
):
    server, client = await setting.add()
    await client.set_version(0)
    await client.load_weights(of(export(1)))
    await client.set_version(1)
    await setting.senders[0].die()
    server.asked.clear()
    await client.load_weights(of(again := export(2)))
    assert routes(server) == [MODEL_INFO, *JOIN, *UPDATE]
    assert has(server, again)
    await client.check_health()


async def test_weights_that_were_replaced_meanwhile_spoil_nothing(setting, export, tmp_path):
    server, client = await setting.add()
    await client.set_version(0)
    with pytest.raises(WorkerFailure, match="were these weights replaced already") as caught:
        await client.load_weights(of(tmp_path / "gone"))
    assert not isinstance(caught.value, WorkerBroken)
    await client.check_health()
    await client.load_weights(of(there := export(1)))
    assert has(server, there)


async def test_what_is_open_is_sent_even_if_its_folder_is_deleted_meanwhile(setting, export):
    server, client = await setting.add()
    await client.set_version(0)
    first = export(1)
    kept = shutil.copytree(first, first.with_name("kept"))
    real, sender = setting.senders[0].send, setting.senders[0]

    async def send(number: int) -> None:
        shutil.rmtree(first, ignore_errors=True)
        await real(number)

    sender.send = send
    await client.load_weights(of(first))
    assert has(server, kept)


async def test_an_update_that_is_called_off_kills_the_sender_that_waits(setting, export):
    server, client = await setting.add()
    await client.set_version(0)
    server.ranks.hangs_in_update = 2
    load = asyncio.create_task(client.load_weights(of(export(1))))
    await server.ranks.hangs.wait()
    load.cancel()
    with pytest.raises(asyncio.CancelledError):
        await load
    assert not setting.senders[0].process.is_running()


async def test_a_hung_server_costs_neither_the_others_nor_the_publish(setting, export):
    """And returns with what was published, whatever was exported after that."""
    for _ in range(2):
        await setting.add()
    hung, other = setting.servers
    hung.ranks.hangs_in_update = 2
    async with InferenceHub(setting.clients) as hub:
        publish = asyncio.create_task(hub.publish(of(published := export(1))))
        await hung.ranks.hangs.wait()
        hub._slots[0].expire_calls()
        report = await publish
        assert [worker.updated for worker in report.per_worker] == [False, True]
        assert has(other, published)
        export(2)  # the trainer steps on

        hung.restart()
        while not hub.stats().workers[0].healthy:
            await asyncio.sleep(0.01)
        assert has(hung, published)
        sampling = SamplingParams(max_tokens=3)
        answers = await asyncio.gather(
            *(hub.generate(GenerateRequest(token_ids=[1], sampling=sampling)) for _ in range(9))
        )
        assert len({answer.worker for answer in answers}) == 2
        assert {v for answer in answers for v in answer.versions} == {1}


async def test_a_server_that_can_not_join_is_told_of_with_what_it_needs(setting, export):
    server, client = await setting.add()
    await client.set_version(0)

    sender = setting.senders[0]
    gloo_id = sender.new_id

    async def nccl_id() -> bytes:
        """Of the group for which the sender waits, as if it had a GPU."""
        return (await gloo_id()).replace(b"gloo", b"nccl")

    sender.new_id = nccl_id
    with pytest.raises(WorkerFailure, match="no nccl without a GPU.*a GPU that the trainer does n"):
        await client.load_weights(of(export(1)))
    await client.check_health()
    await client.load_weights(of(again := export(2)))
    assert has(server, again)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
async def test_only_ranks_of_tensor_parallelism_are_sent_to(sizes, export):
    async def info(request: web.Request) -> web.Response:
        pipeline, data = sizes
        return web.json_response({"tp_size": 2, "pp_size": pipeline, "dp_size": data})

    async def said(request: web.Request) -> web.Response:
        return web.json_response({"weight_version": "default"})

    app = web.Application()
    app.router.add_get("/server_info", info)
    app.router.add_get("/model_info", said)
    app.router.add_post("/update_weight_version", said)
    async with TestServer(app) as listener:
        url = str(listener.make_url("/"))
        client = SglangNcclWorker(url, start_sender=FakeNccl().start_sender)
        with pytest.raises(WorkerFailure, match=r"has pp_size=\d and dp_size=\d, .*--tp-size al"):
            await client.load_weights(of(export(1)))
        await client.close()


# ── a pool ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.timeout(400)
async def test_a_server_that_dies_in_a_transfer_is_started_anew_and_has_all_that_was_published(
    tmp_path, monkeypatch
):
    """Its processes are killed; it samples in earnest, and each publish is probed."""
    monkeypatch.setenv("PYTHONPATH", str(PLANTED), prepend=":")
    words = [f"w{n}" for n in range(50)]
    models = [
        create(tmp_path / str(seed), words, layers=2, hidden_size=64, heads=2, seed=seed)
        for seed in range(3)
    ]
    senders: list[Sender] = []

    def to_server(number: int) -> StartSender:
        async def start() -> Sender:
            senders.append(await Sender.start(tmp_path / "sender.log"))
            return senders[-1]

        return start

    pool = SglangNcclPool(
        str(models[0]), senders=to_server, size=1, max_running=8, max_tokens=256,
        cache_tokens=4096, tensor_parallel=1, devices=[], gpu_memory=0.3, dtype="float32",
        threads=1, seed=0, arguments=(), log_dir=tmp_path / "logs", start_timeout_s=200,
    )  # fmt: skip
    async with InferenceHub(pool, recovery_timeout_s=300) as hub:
        assert (await hub.publish(weights(1, models[1]))).gap.max < 1e-3

        async def dies(number: int) -> None:
            server = psutil.Process(pool.pids[0])
            for process in (server, *server.children(recursive=True)):
                process.kill()
            await Sender.send(senders[0], number)

        senders[0].send = dies
        report = await hub.publish(weights(2, models[2]))
        assert report.workers == 0
        answer = await hub.generate(request(20))
        assert set(answer.versions) == {2}
        sequence = [*PROMPT, *answer.token_ids]
        expected = logprobs(models[2], sequence)[len(PROMPT) - 1 :]
        assert answer.logprobs == pytest.approx(expected, abs=1e-3)
        assert len(senders) == 2
        assert (await hub.publish(weights(3, models[0]))).gap.max < 1e-3
        assert len(senders) == 2
    assert not any(sender.process.is_running() for sender in senders)


# ── the sender itself ────────────────────────────────────────────────────────────────────────

SGLANGS_END = """
import sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _new_process_group_helper

address, port = sys.argv[1:]
patience = timedelta(seconds=60)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
store, rank, size = next(dist.rendezvous(f"tcp://{address}:{port}", 1, 2, timeout=patience))
group, _ = _new_process_group_helper(
    size, rank, [], dist.Backend("gloo"), dist.PrefixStore("flash", store), group_name="flash",
    backend_options=None, timeout=patience, device_id=None,
)
dist.distributed_c10d._world.pg_group_ranks[group] = {0: 0, 1: 1}
bucket = torch.empty(6, dtype=torch.uint8)
dist.broadcast(bucket, src=0, group=group)
print(bucket.view(torch.bfloat16).tolist())
dist.destroy_process_group(group)
"""


async def test_a_group_is_the_one_that_sglang_makes_with_torch(tmp_path):
    """Which the fake server's ranks are not: these are several in a process."""
    save_file({"x": torch.tensor([1.0, 2.0, 3.0]).bfloat16()}, tmp_path / "model.safetensors")
    sender = await Sender.start(tmp_path / "log")
    try:
        group_id = await sender.new_id()
        backend, _, rest = group_id.decode().partition("://")
        address, _, rest = rest.partition(":")
        port, _, name = rest.partition("/")
        assert (backend, address, name) == ("gloo", "127.0.0.1", "flash")
        (process,) = sender.process.children()  # of its guard
        listening = [c.laddr.ip for c in process.net_connections() if c.status == "LISTEN"]
        assert listening == ["127.0.0.1"]
        other = await asyncio.create_subprocess_exec(
            sys.executable, "-W", "ignore", "-c", SGLANGS_END, address, port,
            stdout=subprocess.PIPE,
        )  # fmt: skip
        await sender.join(2)
        assert len(await sender.open(of(tmp_path), 100, delta=False)) == 1
        await sender.send(0)
        said, _ = await other.communicate()
        assert said.decode().strip() == "[1.0, 2.0, 3.0]"
    finally:
        sender.kill()
        await sender.stop()


async def test_the_address_of_a_sender_is_the_one_from_which_its_server_is_reached():
    assert await address_towards("http://127.0.0.1:30000/") == "127.0.0.1"
    assert await address_towards("https://localhost") in ("127.0.0.1", "::1")
    with pytest.raises(ProcessFailure, match="no way leads from this machine to http://no-such"):
        await address_towards("http://no-such-host.invalid:1")
