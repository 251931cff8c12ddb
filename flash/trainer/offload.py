"""The optimizer's state in host memory, while others need the GPU that it trains on."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

# For what a rank computes beside others: the scores of a probe, a tensor to export.
_BESIDE_BYTES = 1 << 30


class Offload:
    """Moves the state of optimizers out of the device's memory, and back into the same tensors.

    Host memory for it is taken once, and pinned where there is a GPU: pages that can move would
    cost as long again.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._host: dict[Tensor, Tensor] = {}  # room for each one's storage
        self._moved: list[Tensor] = []

    @property
    def is_on_host(self) -> bool:
        return bool(self._moved)

    @torch.no_grad()
    def to_host(self) -> None:
        for tensor in [] if self._moved else self._state():
            storage = tensor.untyped_storage()
            if not storage.nbytes():
                continue  # it has it in common with one before
            host = self._host.get(tensor)
            if host is None:
                host = self._host[tensor] = torch.empty(
                    storage.nbytes(), dtype=torch.uint8, pin_memory=tensor.is_cuda
                )
            host.copy_(_bytes(tensor))
            storage.resize_(0)
            self._moved.append(tensor)

    @torch.no_grad()
    def to_device(self) -> None:
        for tensor in self._moved:
            host = self._host[tensor]
            tensor.untyped_storage().resize_(host.numel())
            _bytes(tensor).copy_(host, non_blocking=True)  # what follows is on the same stream
        self._moved = []

    def _state(self) -> Iterator[Tensor]:
        """This rank's share of it, but for numbers."""
        for optimizer in self._optimizers:
            for of_parameter in optimizer.state.values():
                for value in of_parameter.values():
                    local = value.to_local() if isinstance(value, DTensor) else value
                    if isinstance(local, Tensor) and local.dim():
                        yield local


def _bytes(tensor: Tensor) -> Tensor:
    """Of all of its storage, whatever part of it the tensor is."""
    empty = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return empty.set_(tensor.untyped_storage())


def make_room(offload: Offload, share: float, memory: Callable[[], tuple[int, int]]) -> float:
    """Leaves that share of the device's memory free, moving the state out if need be; the share
    that is free then. `memory` tells what is free and what there is, in bytes."""
    free, total = memory()
    if free < share * total + _BESIDE_BYTES:
        offload.to_host()
        free, total = memory()
    return free / total


def memory_of(device: torch.device) -> tuple[int, int]:
    """Free and all bytes of a GPU, once what steps have used and may use again is given back."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)
