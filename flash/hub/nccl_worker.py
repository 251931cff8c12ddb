"""A vLLM server that gets its weights over NCCL, by vLLM's native weight transfer.

    trainer ranks ─► export (host memory) ─► sender ══ NCCL ══► ranks of the server
                                               ▲                     ▲
                                               └──── NcclWorker ─────┘ HTTP: what comes next

Each server has a sender of its own, a process on a GPU of the trainer's, and the two form a NCCL
group; for an explorer's server it is the controller's process. What they send is the export that
was published, so a server that returns late gets the same weights as the others had, whatever the
trainer does meanwhile. NCCL waits for ever for a peer that is gone: when a transfer fails or takes
too long the sender is killed, and its group with it. That costs neither the trainer nor another
server anything.
"""

import asyncio
import base64
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from flash.errors import ProcessFailure, first_error
from flash.hub.http_worker import HttpWorker
from flash.hub.sender import ChunkInfo, SenderProcess, StartSender
from flash.hub.vllm_pool import VllmPool
from flash.hub.worker import WeightsGone, WorkerBroken, WorkerFailure
from flash.types import Weights
from flash.worker.delta import Delta

_CHUNK_BYTES = 1 << 28
_ANSWER_TIMEOUT_S = 5.0
_NO_VERSION = -1


class _WorldSize(msgspec.Struct):
    world_size: int


class _WeightInfo(msgspec.Struct):
    weight_version: str


class NcclWorker(HttpWorker):
    """Client of one vLLM server that was started with `--weight-transfer-config`, backend nccl.

    Args:
        start_sender: starts the process that sends; it is used until a transfer fails.
        chunk_bytes: of one broadcast, and of GPU memory at both ends while it lasts.
        takes_deltas: whether it has our extension; to ask for it would confuse a vLLM without.

    A server in which an update broke off is not well until it has been started anew: its weights
    are neither the old nor the new ones, and its ranks may wait for the sender for ever.
    """

    def __init__(
        self,
        url: str,
        *,
        start_sender: StartSender,
        api_key: str = "",
        chunk_bytes: int = _CHUNK_BYTES,
        takes_deltas: bool = False,
    ) -> None:
        super().__init__(url, api_key=api_key)
        self._takes_deltas = takes_deltas
        self._start_sender = start_sender
        self._chunk_bytes = chunk_bytes
        self._sender: SenderProcess | None = None
        self._joined = False
        self._spoiled = False
        self._told_version = ""

    async def set_version(self, version: int) -> None:
        await super().set_version(version)
        self._told_version = str(version)
        if self._sender is None:
            # Not needed before the next publish, by when it has done its imports: many seconds.
            self._sender = await self._start_sender()

    async def check_health(self) -> None:
        await super().check_health()
        if self._spoiled:
            if not await self._was_restarted():
                raise WorkerBroken(f"{self.name}: an update of its weights broke off")
            self._spoiled = False

    async def load_weights(self, weights: Weights) -> None:
        had, self._has = self._has, None
        try:
            if not self._told_version or await self._was_restarted():
                had = None
                if self._joined:
                    await self._end_sender()
                await self.set_version(_NO_VERSION)  # a mark: its successor will not know it
            await self._load_after(had, weights)
            self._has = weights.path
        except WeightsGone:
            raise
        except ProcessFailure as failure:
            await self._end_sender()
            kind = WorkerBroken if self._spoiled else WorkerFailure
            raise kind(f"{self.name} can't be sent its weights: {failure}") from failure
        except WorkerFailure as failure:
            await self._end_sender()
            if self._spoiled:
                raise WorkerBroken(str(failure)) from failure
            raise
        except BaseException:
            await self._end_sender()
            raise

    async def close(self) -> None:
        await self._end_sender()
        await super().close()

    async def _ready(
        self, weights: Weights, *, delta: bool = False
    ) -> tuple[SenderProcess, list[ChunkInfo]]:
        """A sender that has the weights or their delta, in a group with the server.

        WeightsGone if they are not to be had any more.
        """
        chunks = None
        if self._sender is not None:
            try:
                chunks = await self._sender.open(weights, self._chunk_bytes, delta=delta)
            except ProcessFailure:  # it ended since the last time
                await self._end_sender()
        if self._sender is None:
            self._sender = await self._start_sender()
            chunks = await self._sender.open(weights, self._chunk_bytes, delta=delta)
        if chunks is None:
            raise WeightsGone(f"{self.name}: there are newer weights than {weights.version}")
        if not self._joined:
            await self._join(self._sender)
        return self._sender, chunks

    async def _join(self, sender: SenderProcess) -> None:
        """Form a group of the sender, its rank 0, and the ranks of the server."""
        try:
            answer = await self._call("GET", "/get_world_size")
            with self._readable(answer):
                size = 1 + msgspec.json.decode(answer, type=_WorldSize).world_size
            await self._call("POST", "/shutdown_weight_transfer_engine")  # an earlier group
            group_id = await sender.new_id()
            init_info = {
                "nccl_unique_id_b64": base64.b64encode(group_id).decode(),
                "rank_offset": 1,
                "world_size": size,
                "packed": True,
                "packed_buffer_size_bytes": self._chunk_bytes,
                "packed_num_buffers": 1,  # each update is one chunk
            }
            await _both(
                sender.join(size),
                self._call("POST", "/init_weight_transfer_engine", {"init_info": init_info}),
            )
        except WorkerFailure as failure:
            raise WorkerFailure(
                f"{failure}. A server for engine.transport=nccl has a GPU that the trainer does "
                f"not use, VLLM_SERVER_DEV_MODE=1, and "
                f'--weight-transfer-config \'{{"backend": "nccl"}}\''
            ) from failure
        self._joined = True

    async def _load_whole(self, weights: Weights) -> None:
        sender, chunks = await self._ready(weights)
        self._spoiled = True
        await self._call("POST", "/start_weight_update")
        for number, chunk in enumerate(chunks):
            await _both(
                sender.send(number),
                self._call("POST", "/update_weights", {"update_info": chunk}),
            )
        await self._call("POST", "/finish_weight_update")
        self._spoiled = False

    async def _load_delta(self, weights: Weights, delta: Delta) -> bool:
        sender, chunks = await self._ready(weights, delta=True)
        await self._rpc("begin_flash_delta", tensors=delta.tensors)
        self._spoiled = True
        try:
            for number, chunk in enumerate(chunks):
                await _both(sender.send(number), self._rpc("receive_flash_delta", chunk=chunk))
        except WorkerFailure as failure:
            raise WorkerBroken(str(failure)) from failure  # the group has come apart
        self._has_all_after(delta, await self._rpc("finish_flash_delta"))
        self._spoiled = False
        return True

    async def _was_restarted(self) -> bool:
        """Whether it is another process than the one that was told its version last."""
        try:
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                answer = await self._call("GET", "/weight_info")
        except TimeoutError:
            return False  # its ranks hang
        with self._readable(answer):
            version = msgspec.json.decode(answer, type=_WeightInfo).weight_version
        return version != self._told_version

    async def _end_sender(self) -> None:
        sender, self._sender, self._joined = self._sender, None, False
        if sender is not None:
            sender.kill()
            await sender.stop()


class NcclPool(VllmPool):
    """vLLM servers that get their weights over NCCL.

    Args:
        senders: starts the sender of a server, by its number.
    """

    def __init__(
        self,
        model: str,
        *,
        senders: Callable[[int], StartSender],
        arguments: tuple[str, ...],
        **options: Any,
    ) -> None:
        own = '--weight-transfer-config={"backend": "nccl"}'
        super().__init__(model, arguments=(own, *arguments), **options)
        self._senders = senders

    def _client(self, number: int, url: str) -> NcclWorker:
        return NcclWorker(
            url, api_key=self._api_key, start_sender=self._senders(number), takes_deltas=True
        )


async def _both(*calls: Coroutine[Any, Any, Any]) -> None:
    """Waits for all; the first that fails ends the others."""
    with first_error():
        async with asyncio.TaskGroup() as tasks:
            for call in calls:
                tasks.create_task(call)
