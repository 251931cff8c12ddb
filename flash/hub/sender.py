"""The seam to the processes that send weights to servers, and those of this machine.

A sender has a GPU of the trainer's, and forms a NCCL group with the ranks of one server, of vLLM
(flash/trainer/nccl.py) or SGLang (flash/trainer/process_group.py). It is this process's own, or,
for an explorer, one of its controller's, which is reached through their link
(flash/explorer/remote_senders.py).
"""

import asyncio
import ipaddress
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import msgspec
import psutil

from flash.errors import ProcessFailure
from flash.system.process import Child
from flash.types import Weights
from flash.worker.delta import FOLDER

_TO_VLLM, _TO_SGLANG = "flash.trainer.nccl", "flash.trainer.process_group"
_INTERFACE = "NCCL_SOCKET_IFNAME"


class ChunkInfo(msgspec.Struct, frozen=True):
    """What a server must be told of a chunk before it is sent."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class SenderProcess(Protocol):
    """A `flash.trainer.sender.Sender`. Every method raises ProcessFailure when it fails or is gone.

    Each waits for the other side as long as it takes: whoever has no more patience ends it.
    """

    async def new_id(self) -> bytes: ...

    async def join(self, size: int) -> None:
        """The group of the last `new_id`, of so many ranks."""
        ...

    async def open(
        self, weights: Weights, chunk_bytes: int, *, delta: bool
    ) -> list[ChunkInfo] | None:
        """All of them, or their delta; None if these weights are not to be had any more."""
        ...

    async def send(self, number: int) -> None: ...

    def kill(self) -> None:
        """It may hang in NCCL, and has nothing to put in order."""
        ...

    async def stop(self) -> None:
        """Waits until it has ended, after `kill`."""
        ...


StartSender = Callable[[], Awaitable[SenderProcess]]


class LocalSender:
    """A sender that is a child of this process."""

    def __init__(self, child: Child) -> None:
        self._child = child

    async def new_id(self) -> bytes:
        group_id: bytes = await self._child.call("new_id")
        return group_id

    async def join(self, size: int) -> None:
        await self._child.call("join", size)

    async def open(
        self, weights: Weights, chunk_bytes: int, *, delta: bool
    ) -> list[ChunkInfo] | None:
        path = weights.path / FOLDER if delta else weights.path
        answer = await self._child.call("open", str(path), chunk_bytes)
        return msgspec.convert(answer, list[ChunkInfo])

    async def send(self, number: int) -> None:
        await self._child.call("send", number)

    def kill(self) -> None:
        self._child.kill()

    async def stop(self) -> None:
        await self._child.stop()


def nccl_sender(
    device: int,
    *,
    name: str,
    log_path: Path,
    env: Mapping[str, str] | None = None,
    address: str | None = None,
) -> StartSender:
    """Starts senders on a GPU of the trainer's, by its number among those that it sees.

    `address`: of this machine, where an SGLang server is to find it; None: it sends to vLLM's.
    """
    words, variables = [_TO_VLLM, str(device)], {**(env or {})}
    if address is not None:
        ip = _plain(address)
        at = str(ip) if isinstance(ip, ipaddress.IPv4Address) else address
        words = [_TO_SGLANG, str(device), at]
        # As SGLang has it in its servers, if nobody says otherwise: both ends must have the same.
        variables["NCCL_CUMEM_ENABLE"] = os.environ.get("NCCL_CUMEM_ENABLE", "0")

    async def start() -> LocalSender:
        return LocalSender(await Child.start(*words, name=name, log_path=log_path, env=variables))

    return start


async def address_towards(url: str) -> str:
    """Of this machine: from where its packets go to a server. None is sent.

    Raises ProcessFailure if there is no way to it.
    """
    at = urlsplit(url)
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            at.hostname, at.port or at.scheme, type=socket.SOCK_DGRAM
        )
        family, kind, _, _, server = found[0]
        with socket.socket(family, kind) as way:
            way.connect(server)
            address: str = way.getsockname()[0]
    except OSError as error:
        raise ProcessFailure(f"no way leads from this machine to {url}: {error}") from error
    return address


def listening_at(address: str) -> dict[str, str]:
    """The variables with which NCCL listens at the interface of that address of this machine.

    On loopback at no other; else `$NCCL_SOCKET_IFNAME` may name one that is faster. Raises
    ProcessFailure for an address that is none of this machine's.
    """
    ip = _plain(address)
    if ip is None:
        raise ProcessFailure(f"{address!r} is no address of this machine, where a sender could be")
    if _INTERFACE in os.environ and not ip.is_loopback:
        return {}
    for name, addresses in psutil.net_if_addrs().items():
        for other in (_plain(each.address) for each in addresses):
            if other == ip or (other and ip.is_loopback and other.is_loopback):
                family = "AF_INET" if ip.version == 4 else "AF_INET6"
                return {_INTERFACE: f"={name}", "NCCL_SOCKET_FAMILY": family}
    raise ProcessFailure(f"no interface of this machine has the address {address}")


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """None for what is no address of the internet's: an interface has others, too."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip
