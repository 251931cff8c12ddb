"""A vLLM server that gets its weights over NCCL, by vLLM's native weight transfer."""

import base64
from collections.abc import Callable
from typing import Any

import msgspec

from flash.hub.http_worker import HttpWorker
from flash.hub.sender import SenderProcess, StartSender
from flash.hub.transfer import CHUNK_BYTES, Transfer, both
from flash.hub.vllm_pool import VllmPool
from flash.hub.worker import WorkerBroken, WorkerFailure
from flash.types import Weights
from flash.worker.delta import Delta


class _WorldSize(msgspec.Struct):
    world_size: int


class _WeightInfo(msgspec.Struct):
    weight_version: str


class NcclWorker(HttpWorker):
    """Client of one vLLM server that was started with `--weight-transfer-config`, backend nccl.

    Args:
        start_sender, chunk_bytes: as of its `Transfer`.
        takes_deltas: whether it has our extension; to ask for it would confuse a vLLM without.
    """

    def __init__(
        self,
        url: str,
        *,
        start_sender: StartSender,
        api_key: str = "",
        chunk_bytes: int = CHUNK_BYTES,
        takes_deltas: bool = False,
    ) -> None:
        super().__init__(url, api_key=api_key)
        self._takes_deltas = takes_deltas
        self._transfer = Transfer(self, start_sender, chunk_bytes=chunk_bytes)

    async def set_version(self, version: int) -> None:
        await super().set_version(version)
        await self._transfer.told(version)

    async def check_health(self) -> None:
        await super().check_health()
        await self._transfer.check()

    async def load_weights(self, weights: Weights) -> None:
        had, self._has = self._has, None
        async with self._transfer.begun() as is_first:
            await self._load_after(None if is_first else had, weights)
            self._has = weights.path

    async def close(self) -> None:
        await self._transfer.end()
        await super().close()

    async def join(self, sender: SenderProcess) -> None:
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
                "packed_buffer_size_bytes": self._transfer.chunk_bytes,
                "packed_num_buffers": 1,  # each update is one chunk
            }
            await both(
                sender.join(size),
                self._call("POST", "/init_weight_transfer_engine", {"init_info": init_info}),
            )
        except WorkerFailure as failure:
            raise WorkerFailure(
                f"{failure}. A server for engine.transport=nccl has a GPU that the trainer does "
                f"not use, VLLM_SERVER_DEV_MODE=1, and "
                f'--weight-transfer-config \'{{"backend": "nccl"}}\''
            ) from failure

    async def told_version(self) -> str:
        answer = await self._call("GET", "/weight_info")
        with self._readable(answer):
            return msgspec.json.decode(answer, type=_WeightInfo).weight_version

    async def _load_whole(self, weights: Weights) -> None:
        sender, chunks = await self._transfer.ready(weights)
        with self._transfer.changing():
            await self._call("POST", "/start_weight_update")
            for number, chunk in enumerate(chunks):
                await both(
                    sender.send(number),
                    self._call("POST", "/update_weights", {"update_info": chunk}),
                )
            await self._call("POST", "/finish_weight_update")

    async def _load_delta(self, weights: Weights, delta: Delta) -> bool:
        sender, chunks = await self._transfer.ready(weights, delta=True)
        await self._rpc("begin_flash_delta", tensors=delta.tensors)
        with self._transfer.changing():
            try:
                for number, chunk in enumerate(chunks):
                    await both(sender.send(number), self._rpc("receive_flash_delta", chunk=chunk))
            except WorkerFailure as failure:
                raise WorkerBroken(str(failure)) from failure  # the group has come apart
            self._has_all_after(delta, await self._rpc("finish_flash_delta"))
        return True


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
