"""Sends exported weights to the ranks of one server, of vLLM or SGLang, chunk by chunk.

    open ─► chunks: names, dtypes, shapes ─► the server is told of one ─► send: its bytes
                                                       ▲                     │
                                                       └──────── next ───────┘

A chunk is what vLLM's packed transfer and SGLang's flattened buckets take in one broadcast: tensors
of one dtype, their bytes one after the other. The group that carries it is that of
`flash/trainer/nccl.py` or `flash/trainer/process_group.py`.
"""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from flash.worker.tensors import Chunk, chunks_of


class Group(Protocol):
    """This process, which is rank 0, and the ranks of one server.

    `new_id` makes the bytes that all of them need to find each other.
    """

    device: torch.device

    def new_id(self) -> bytes: ...

    def join(self, group_id: bytes, size: int) -> None:
        """Waits until all `size` ranks are there."""
        ...

    def broadcast(self, packed: Tensor) -> None:
        """Waits until every rank has it."""
        ...


class Sender:
    """Answers the calls of a server's client (`flash/hub/transfer.py`), one at a time.

    Each call waits for the other side as long as it takes: the caller kills this process when
    that is too long.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._chunks: list[Chunk] = []
        self._group_id = b""

    def new_id(self) -> bytes:
        self._group_id = self._group.new_id()
        return self._group_id

    def join(self, size: int) -> None:
        """The group of the last `new_id`, and no other: who asks may be far away."""
        self._group.join(self._group_id, size)

    def open(self, directory: str, chunk_bytes: int) -> list[dict[str, Any]]:
        """What the server must be told of each chunk before it is sent.

        From now on these weights can be sent, even if the directory is deleted meanwhile.
        """
        self._chunks = chunks_of(Path(directory), chunk_bytes)
        return [
            {
                "names": list(chunk),
                "dtype_names": [str(t.dtype).removeprefix("torch.") for t in chunk.values()],
                "shapes": [list(tensor.shape) for tensor in chunk.values()],
            }
            for chunk in self._chunks
        ]

    def send(self, number: int) -> None:
        """Broadcast one chunk of what is open."""
        self._group.broadcast(packed(self._chunks[number], self._group.device))


def packed(chunk: Chunk, device: torch.device) -> Tensor:
    """The bytes of a chunk's tensors, in order, on `device`: uint8."""
    flat = torch.empty(sum(t.nbytes for t in chunk.values()), dtype=torch.uint8, device=device)
    end = 0
    for tensor in chunk.values():
        start, end = end, end + tensor.nbytes
        flat[start:end].copy_(tensor.reshape(-1).view(torch.uint8))
    return flat
