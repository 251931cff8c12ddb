"""An SGLang server that gets its weights over NCCL, by torch's groups, as SGLang makes them.

A chunk is a call, between `begin_weight_update` and `end_weight_update`, while
generation is paused; the last of them drops keys and values of the weights before.
(SGLang 0.5.23: srt/managers/scheduler_components/weight_updater.py.)
"""

import contextlib
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import msgspec

from flash.hub.sender import SenderProcess, StartSender
from flash.hub.server_client import Body
from flash.hub.sglang_pool import SglangPool
from flash.hub.sglang_worker import SglangWorker
from flash.hub.transfer import CHUNK_BYTES, Transfer, both
from flash.hub.worker import BadRequest, WorkerFailure
from flash.types import Weights


class _Ranks(msgspec.Struct):
    """Of /server_info: one group has the ranks of tensor parallelism, and no others."""

    tp_size: int
    pp_size: int
    dp_size: int


class _ModelInfo(msgspec.Struct):
    weight_version: str


class SglangNcclWorker(SglangWorker):
    """Client of one SGLang server; `start_sender` and `chunk_bytes` are as of its `Transfer`."""

    def __init__(
        self,
        url: str,
        *,
        start_sender: StartSender,
        api_key: str = "",
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        super().__init__(url, api_key=api_key)
        self._transfer = Transfer(self, start_sender, chunk_bytes=chunk_bytes)
        self._group = ""

    async def set_version(self, version: int) -> None:
        await super().set_version(version)
        await self._transfer.told(version)

    async def check_health(self) -> None:
        await super().check_health()
        await self._transfer.check()

    async def close(self) -> None:
        await self._transfer.end()
        await super().close()

    async def load_weights(self, weights: Weights) -> None:
        async with self._transfer.begun():
            sender, chunks = await self._transfer.ready(weights)
            with self._transfer.changing():
                await self._do("/begin_weight_update", {})
                for number, chunk in enumerate(chunks):
                    body = {
                        "names": chunk.names,
                        "dtypes": chunk.dtype_names,
                        "shapes": chunk.shapes,
                        "group_name": self._group,
                        "load_format": "flattened_bucket",
                        "flush_cache": number == len(chunks) - 1 and not self._keeps_stale,
                    }
                    await both(
                        sender.send(number), self._do("/update_weights_from_distributed", body)
                    )
                await self._do("/end_weight_update", {})

    async def join(self, sender: SenderProcess) -> None:
        answer = await self._call("GET", "/server_info")
        with self._readable(answer):
            ranks = msgspec.json.decode(answer, type=_Ranks)
        if ranks.pp_size > 1 or ranks.dp_size > 1:
            raise WorkerFailure(
                f"{self.name} has pp_size={ranks.pp_size} and dp_size={ranks.dp_size}, where "
                f"engine.transport=nccl takes 1 of either: start it with --tp-size alone, or use "
                f"engine.transport=disk"
            )
        at = urlsplit((await sender.new_id()).decode())
        self._group = at.path.removeprefix("/")
        with contextlib.suppress(BadRequest):  # there is none of an earlier sender's
            await self._call("POST", "/destroy_weights_update_group", {"group_name": self._group})
        body = {
            "master_address": at.hostname,
            "master_port": at.port,
            "rank_offset": 1,
            "world_size": 1 + ranks.tp_size,
            "group_name": self._group,
            "backend": at.scheme,
        }
        try:
            await both(sender.join(1 + ranks.tp_size), self._do("/init_weights_update_group", body))
        except WorkerFailure as failure:
            raise WorkerFailure(
                f"{failure}. A server for engine.transport=nccl has a GPU that the trainer does "
                f"not use, and reaches {at.hostname}"
            ) from failure

    async def told_version(self) -> str:
        answer = await self._call("GET", "/model_info")
        with self._readable(answer):
            return msgspec.json.decode(answer, type=_ModelInfo).weight_version

    async def _do(self, route: str, body: Body) -> None:
        """WorkerFailure if the server refuses it: it is no request's fault."""
        try:
            await self._call("POST", route, body)
        except BadRequest as refusal:
            raise WorkerFailure(str(refusal)) from refusal


class SglangNcclPool(SglangPool):
    """SGLang servers that get their weights over NCCL.

    Args:
        senders: starts the sender of a server, by its number.
    """

    def __init__(
        self, model: str, *, senders: Callable[[int], StartSender], **options: Any
    ) -> None:
        super().__init__(model, **options)
        self._senders = senders

    def _client(self, number: int, url: str) -> SglangNcclWorker:
        return SglangNcclWorker(url, api_key=self._api_key, start_sender=self._senders(number))
