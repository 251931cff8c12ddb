"""The other end, inside a vLLM server: its NCCL transfer engine with gloo in NCCL's place.

`--worker-extension-cls gloo_engine.Extension` has vLLM's workers import this file, which adds the
backend "gloo" for `--weight-transfer-config`. All but the communicator is vLLM's own.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from gloo_sender import Communicator
from unpacked import UnpackedLoader
from vllm.distributed.weight_transfer import packed_tensor
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine


class Extension(UnpackedLoader):
    """Beside what it does, a reason to import this file."""


class GlooTransferEngine(NCCLWeightTransferEngine):
    def init_transfer_engine(self, init_info: Any) -> None:
        host, port = init_info.nccl_unique_id_bytes.rstrip(b"\0").decode().split(":")
        store = dist.TCPStore(host, int(port), is_master=False, wait_for_workers=False)
        rank = self.parallel_config.rank + init_info.rank_offset
        self.packed = init_info.packed
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        self.packed_num_buffers = init_info.packed_num_buffers
        self.model_update_group = Communicator(store, rank, init_info.world_size)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        with _no_streams():
            super().update_weights(update_info)


@contextlib.contextmanager
def _no_streams() -> Iterator[None]:
    """Stands for what the engine asks of CUDA beside its communicator."""
    streams = [mock.Mock()]
    with (
        mock.patch.object(packed_tensor, "_get_streams", lambda device, n: streams * n),
        mock.patch.object(torch.cuda, "stream", lambda stream: contextlib.nullcontext()),
        mock.patch.object(torch.accelerator, "current_device_index", lambda: 0),
        mock.patch.object(torch.accelerator, "synchronize", lambda: None),
    ):
        yield


WeightTransferEngineFactory.register_engine("gloo", GlooTransferEngine)
