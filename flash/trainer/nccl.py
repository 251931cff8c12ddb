"""`python -m flash.trainer.nccl DEVICE`: the sender over NCCL, on one of the trainer's GPUs.

A process of its own, apart from the trainer's ranks: NCCL waits for ever for a peer that has died,
while a group forms it can't even be called off, and vLLM changes torch as it is imported. So what
goes wrong here ends with this process, and training does not wait for any of it.

vLLM's own communicator is used, because both ends must do the same to form a group.
"""

import sys

import torch
from torch import Tensor
from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary
from vllm.distributed.weight_transfer.nccl_common import uid_init_process_group

from flash.system.process import serve
from flash.trainer.sender import Sender


class NcclGroup:
    """This process and the ranks of one vLLM server; no two of them may use the same GPU."""

    def __init__(self, device: int) -> None:
        torch.cuda.set_device(device)
        self.device = torch.device("cuda", device)
        self._communicator: PyNcclCommunicator | None = None

    def new_id(self) -> bytes:
        return bytes(NCCLLibrary().ncclGetUniqueId().internal)

    def join(self, group_id: bytes, size: int) -> None:
        self._communicator = uid_init_process_group(group_id, 0, size, self.device)
        if self._communicator.disabled:
            # It would send nothing, in silence, and the servers load what their memory holds.
            raise RuntimeError("VLLM_DISABLE_PYNCCL is set: unset it for engine.transport=nccl")

    def broadcast(self, packed: Tensor) -> None:
        assert self._communicator is not None
        stream = torch.cuda.current_stream()  # the one on which the chunk was packed
        self._communicator.broadcast(packed, src=0, stream=stream)
        stream.synchronize()


if __name__ == "__main__":
    serve(Sender(NcclGroup(int(sys.argv[1]))))
