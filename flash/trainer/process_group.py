"""`python -m flash.trainer.process_group DEVICE ADDRESS`: the sender to SGLang servers, by torch.

DEVICE is the number of one of the trainer's GPUs, from which NCCL sends, or `cpu`, from which gloo
does. SGLang makes its end of a group of torch's by a function of torch's own that makes one beside
others, and so does this, because both ends must do the same. It is a process of its own for the
reasons that `flash/trainer/nccl.py` has.
"""

import socket
import sys
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch import Tensor

from flash.system.process import serve
from flash.trainer.sender import Sender

_dist: Any = dist  # its types lack stores, and what begins with _
_PATIENCE = timedelta(minutes=30)  # whoever has less kills this process
_NAME = "flash"  # of the group, as servers know it; of each the one that sends to it


class ProcessGroup:
    """This process and the ranks of one SGLang server; no two of them may use the same GPU.

    Args:
        address: of this machine, at which the server can reach it; it listens at no other.

    Its id is a URL: what carries it, where this process waits for the others, and its name.
    """

    def __init__(self, device: torch.device, address: str) -> None:
        self.device = device
        self._address = address
        if device.type == "cuda":
            torch.cuda.set_device(device)

    def new_id(self) -> bytes:
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        listener = socket.create_server((self._address, 0), family=family)
        port = listener.getsockname()[1]
        self._store = _dist.TCPStore(
            self._address,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        host = f"[{self._address}]" if ":" in self._address else self._address
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        return f"{backend}://{host}:{port}/{_NAME}".encode()

    def join(self, group_id: bytes, size: int) -> None:
        self._group, _ = _dist.distributed_c10d._new_process_group_helper(
            size,
            0,
            [],
            urlsplit(group_id.decode()).scheme,
            _dist.PrefixStore(_NAME, self._store),
            group_name=_NAME,
            timeout=_PATIENCE,
        )

    def broadcast(self, packed: Tensor) -> None:
        self._group.broadcast(packed, 0).wait()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


if __name__ == "__main__":
    _, device, address = sys.argv
    kind = torch.device(device if device == "cpu" else f"cuda:{device}")
    serve(Sender(ProcessGroup(kind, address)))
