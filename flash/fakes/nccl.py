"""Weights over NCCL without GPUs: senders' processes and vLLM servers that only play their parts.

As with NCCL, each side waits for the other, for ever: what one sends the other takes, in order.

    nccl = FakeNccl()
    server = FakeVllm(FakeWorker("server"), nccl)      its `app()` is to be served
    NcclWorker(url, start_sender=nccl.start_sender)    the client of both
"""

import asyncio
import base64
import itertools
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from aiohttp import web

from flash.errors import ProcessFailure
from flash.fakes.routes import worker_app
from flash.fakes.worker import FakeWorker
from flash.hub.sender import ChunkInfo
from flash.types import Weights
from flash.worker.delta import FOLDER, PLACE_BYTES, Had, TensorInfo

Chunk = tuple[ChunkInfo, bytes]

_ID_BYTES = 128
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U8": "uint8"}
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}
_WORDS = {"float32": np.int32, "bfloat16": np.int16, "float16": np.int16}


class FakeNccl:
    """The groups that senders and servers form, by their ids; and the senders that were started.

    Args:
        ranks: of each server.
    """

    def __init__(self, *, ranks: int = 1) -> None:
        self.ranks = ranks
        self.senders: list[FakeSender] = []
        self._groups: dict[bytes, _Group] = {}
        self._ids = itertools.count()

    async def start_sender(self) -> "FakeSender":
        sender = FakeSender(self)
        self.senders.append(sender)
        return sender

    def new_id(self) -> bytes:
        return str(next(self._ids)).encode().ljust(_ID_BYTES)

    def group(self, group_id: bytes) -> "_Group":
        return self._groups.setdefault(group_id, _Group())


class _Group:
    """What a sender and a server share: both are there before either goes on."""

    def __init__(self) -> None:
        self.meeting = asyncio.Barrier(2)
        self._chunks: asyncio.Queue[tuple[bytes, asyncio.Event]] = asyncio.Queue(maxsize=1)

    async def send(self, chunk: bytes) -> None:
        received = asyncio.Event()
        await self._chunks.put((chunk, received))
        await received.wait()

    async def receive(self) -> bytes:
        chunk, received = await self._chunks.get()
        received.set()
        return chunk


class FakeSender:
    """A sender's process: it answers calls, hangs until the other side is there, and dies.

    `dies_in_chunk`: of all that it ever sends, that one; -1: of none.
    """

    def __init__(self, nccl: FakeNccl) -> None:
        self.ended = False
        self.sent = 0
        self.dies_in_chunk = -1
        self.nccl = nccl
        self._chunks: list[Chunk] = []
        self._death = asyncio.Event()

    def die(self) -> None:
        """As a process that is killed; what it was asked fails."""
        self._death.set()

    async def new_id(self) -> bytes:
        self._check_alive()
        self._group_id = self.nccl.new_id()
        return self._group_id

    async def join(self, size: int) -> None:
        self._check_alive()
        assert size == 1 + self.nccl.ranks
        self._group = self.nccl.group(self._group_id)
        await self._or_death(self._group.meeting.wait())

    async def open(
        self, weights: Weights, chunk_bytes: int, *, delta: bool
    ) -> list[ChunkInfo] | None:
        self._check_alive()
        if delta:
            weights = replace(weights, path=weights.path / FOLDER)
        self._chunks = self.chunks_of(weights, chunk_bytes)
        if not self._chunks:
            raise ProcessFailure(f"no safetensors in {weights.path}: were they replaced already?")
        return [info for info, _ in self._chunks]

    async def send(self, number: int) -> None:
        self._check_alive()
        if self.sent == self.dies_in_chunk:
            self.die()
            self._check_alive()
        self.sent += 1
        await self._or_death(self._group.send(self._chunks[number][1]))

    def kill(self) -> None:
        self.ended = True
        self.die()

    async def stop(self) -> None:
        assert self.ended

    def chunks_of(self, weights: Weights, chunk_bytes: int) -> list[Chunk]:
        """Here each tensor is a chunk."""
        return [
            (ChunkInfo([name], [dtype], [shape]), data)
            for name, dtype, shape, data in _tensors(weights.path)
        ]

    async def _or_death(self, doing: Any) -> None:
        """NCCL's wait, which nothing but the process's death ends early."""
        waits = [asyncio.ensure_future(doing), asyncio.ensure_future(self._death.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not waits[0].done():
                self._check_alive()
            waits[0].result()
        finally:
            for wait in waits:
                wait.cancel()

    def _check_alive(self) -> None:
        if self._death.is_set():
            raise ProcessFailure("sender (pid 1) ended with exit code -9")


class FakeVllm:
    """A server with the routes of vLLM's weight transfer, and what they insist on.

    `loaded`: the bytes of each tensor that it has; `asked`: the routes, in order, and methods that
    it is called by. Updates, a delta's too, are counted over all of its life: that of number
    `fails_in_update` fails, and that of `hangs_in_update` never ends. It `refuses_deltas`, or
    `loses` a value of the tensor of that name as it takes one.
    """

    def __init__(self, worker: FakeWorker, nccl: FakeNccl) -> None:
        self.worker = worker
        self.asked: list[str] = []
        self.init_infos: list[dict[str, Any]] = []
        self.loaded: dict[str, bytes] = {}
        self.updates = 0
        self.fails_in_update = self.hangs_in_update = -1
        self.refuses_deltas = False
        self.loses = ""
        self.hangs = asyncio.Event()  # is set once it does
        self._nccl = nccl
        self._group: _Group | None = None
        self._active = False
        self._tensors: list[TensorInfo] = []  # of the export that a delta is to lead to
        self._methods: dict[str, Callable[..., Awaitable[Any]]] = {
            "begin_flash_delta": self._begin_delta,
            "receive_flash_delta": self._receive_delta,
            "finish_flash_delta": self._finish_delta,
        }
        self._routes: dict[str, Callable[[Any], Awaitable[dict[str, Any]]]] = {
            "/get_world_size": self._world_size,
            "/init_weight_transfer_engine": self._init,
            "/shutdown_weight_transfer_engine": self._shutdown,
            "/start_weight_update": self._start,
            "/update_weights": self._update,
            "/finish_weight_update": self._finish,
            "/collective_rpc": self._called,
        }

    def app(self) -> web.Application:
        """To be served: its worker's routes, and these."""
        app = worker_app(self.worker)
        app.middlewares.append(self._note)
        app.router.add_get("/get_world_size", self._respond)
        for route in self._routes.keys() - {"/get_world_size", "/collective_rpc"}:
            app.router.add_post(route, self._respond)
        return app

    async def answer(self, route: str, body: Any) -> dict[str, Any]:
        """To a request at one of the routes of weight transfer; RuntimeError if it fails."""
        return await self._routes[route](body)

    def restart(self) -> None:
        """As its pool does: all that it knew is gone."""
        self.worker.restart(version=-7)
        self._group, self._active, self.loaded = None, False, {}

    def has(self, folder: Path) -> bool:
        """Whether its weights are those of that folder, all of them."""
        return self.loaded == {name: data for name, _, _, data in _tensors(folder)}

    @web.middleware
    async def _note(self, request: web.Request, handler: Any) -> web.StreamResponse:
        if request.path == "/collective_rpc":  # its worker's too
            handler = self._respond
        else:
            self.asked.append(request.path)
        response: web.StreamResponse = await handler(request)
        return response

    async def _respond(self, request: web.Request) -> web.Response:
        body = await request.json() if request.body_exists else None
        try:
            return web.json_response(await self.answer(request.path, body))
        except RuntimeError as error:
            return web.json_response({"error": str(error)}, status=500)

    async def _world_size(self, body: Any) -> dict[str, Any]:
        return {"world_size": self._nccl.ranks}

    async def _init(self, body: Any) -> dict[str, Any]:
        info = body["init_info"]
        self.init_infos.append(info)
        group_id = base64.b64decode(info["nccl_unique_id_b64"], validate=True)
        self._group = self._nccl.group(group_id)
        await self._group.meeting.wait()
        return {}

    async def _shutdown(self, body: Any) -> dict[str, Any]:
        self._group = None
        return {}

    async def _start(self, body: Any) -> dict[str, Any]:
        if self._active:
            raise RuntimeError("an update is already active")
        self._active = True
        return {}

    async def _update(self, body: Any) -> dict[str, Any]:
        if not self._active:
            raise RuntimeError("not started")
        self.loaded |= await self._receive(body["update_info"])
        return {}

    async def _receive(self, chunk: Any) -> dict[str, bytes]:
        """What the sender sends of each tensor."""
        if self._group is None:
            raise RuntimeError("not initialized")
        self.updates += 1
        if self.updates == self.fails_in_update:
            raise RuntimeError("out of memory")
        if self.updates == self.hangs_in_update:
            self.hangs.set()
            await asyncio.Event().wait()
        packed = await self._group.receive()
        parts, end = {}, 0
        for name, dtype, shape in zip(
            chunk["names"], chunk["dtype_names"], chunk["shapes"], strict=True
        ):
            start, end = end, end + _size(dtype, shape)
            parts[name] = packed[start:end]
        assert end == len(packed)
        return parts

    async def _finish(self, body: Any) -> dict[str, Any]:
        if not self._active:
            raise RuntimeError("no update to finish")
        self._active = False
        return {}

    async def _called(self, body: Any) -> dict[str, Any]:
        """What fails is an answer here, as of our extension."""
        self.asked.append(body["method"])
        try:
            answer = await self._methods[body["method"]](**body["kwargs"])
        except RuntimeError as error:
            answer = {"error": repr(error)}
        return {"results": [answer] * self._nccl.ranks}

    async def _begin_delta(self, tensors: list[Any]) -> None:
        if self.refuses_deltas:
            raise RuntimeError("quantized")
        self._tensors = msgspec.convert(tensors, list[TensorInfo])

    async def _receive_delta(self, chunk: Any) -> None:
        parts = await self._receive(chunk)
        for tensor in self._tensors:
            if (part := parts.get(tensor.name)) is not None:
                end = tensor.changed * PLACE_BYTES
                words = np.frombuffer(self.loaded[tensor.name], _WORDS[tensor.dtype]).copy()
                values = np.frombuffer(part, words.dtype, tensor.changed, end)
                changed = tensor.changed - (tensor.name == self.loses)
                words[np.frombuffer(part, np.int32, changed)] = values[:changed]
                self.loaded[tensor.name] = words.tobytes()

    async def _finish_delta(self) -> list[Had]:
        """Each rank has all of every tensor."""
        had: list[Had] = []
        for tensor in self._tensors:
            words = np.frombuffer(self.loaded[tensor.name], _WORDS[tensor.dtype])
            had.append((len(words), int(words.sum(dtype=np.int64))))
        return had


def _tensors(folder: Path) -> list[tuple[str, str, list[int], bytes]]:
    """Name, dtype, shape and bytes of what is in its safetensors."""
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        for name, about in header.items():
            first, last = about["data_offsets"]
            tensor = data[start + first : start + last]
            found.append((name, _DTYPES[about["dtype"]], about["shape"], tensor))
    return found


def _size(dtype: str, shape: list[int]) -> int:
    size = _BYTES[dtype]
    for length in shape:
        size *= length
    return size
