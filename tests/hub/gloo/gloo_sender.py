"""`python -m gloo_sender`: the sender of weights with gloo in NCCL's place, for machines without.

It dies in the chunk that `$DIE_IN_CHUNK` names, counted from 0 over all of its life.
"""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from flash.system.process import serve
from flash.trainer.sender import Sender

_ID_BYTES = 128  # as many as NCCL's
_TIMEOUT = timedelta(seconds=60)


class Communicator:
    """What both ends use of vLLM's PyNcclCommunicator."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._gloo = dist.ProcessGroupGloo(dist.PrefixStore("group", store), rank, size, _TIMEOUT)

    def broadcast(self, tensor: Tensor, src: int, stream: object = None) -> None:
        options = dist.BroadcastOptions()
        options.rootRank = src
        self._gloo.broadcast([tensor], options).wait()

    def destroy(self) -> None:
        pass


class GlooGroup:
    device = torch.device("cpu")

    def __init__(self) -> None:
        self._chunk = 0
        self._dies_in = int(os.environ.get("DIE_IN_CHUNK", "-1"))

    def new_id(self) -> bytes:
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return f"127.0.0.1:{self._store.port}".encode().ljust(_ID_BYTES, b"\0")

    def join(self, group_id: bytes, size: int) -> None:
        self._communicator = Communicator(self._store, 0, size)

    def broadcast(self, packed: Tensor) -> None:
        if self._chunk == self._dies_in:
            os.kill(os.getpid(), signal.SIGKILL)
        self._chunk += 1
        self._communicator.broadcast(packed, src=0)


if __name__ == "__main__":
    serve(Sender(GlooGroup()))
