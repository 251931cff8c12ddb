"""Hosts of their own on one machine, and a network between them that is as bad as one asks for.

    host a ─ TUN ─┐
    host b ─ TUN ─┼─ Network: loses, delays, doubles and reorders packets; cuts hosts off
    host c ─ TUN ─┘

A host is a network namespace with one device, a mount namespace in which folders of this machine
are empty, and a name. All of it ends with the processes in it. Needs Linux, root and /dev/net/tun;
nothing of iproute2, and of the kernel neither veth nor netem.
"""

import asyncio
import contextlib
import math
import os
import random
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

_SUBNET = "10.77.0."
_LARGEST_PACKET = 1 << 16
_AT_ONCE = 64  # packets of one host, before another one's turn
_QUEUED_S = 0.2  # what a slow line keeps at most before it drops
_STARTS_S = 30.0

_UNSHARE = ("unshare", "--net", "--mount", "--uts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What packets meet between two hosts, each way; shares are of all packets."""

    loss: float = 0.0
    delay_s: float = 0.0
    jitter_s: float = 0.0  # at most, beside the delay
    doubled: float = 0.0
    reordered: float = 0.0  # these are not delayed, and overtake
    bytes_per_s: float = math.inf  # of each host, to the others and from them


@dataclass(slots=True, eq=False)
class Host:
    """A host in a network, which lives as long as its process."""

    name: str
    address: str
    process: int
    tun: int
    is_cut_off: bool = False
    sent: Counter[str] = field(default_factory=Counter)  # packets, by their receiver's name
    sends_next_at: float = 0.0  # when its line is free
    receives_next_at: float = 0.0
    last_arrival: dict["Host", float] = field(default_factory=dict)  # of what it sent, by receiver

    @property
    def inside(self) -> tuple[str, ...]:
        """Before a command, starts it there."""
        return ("nsenter", "--target", str(self.process), "--net", "--mount", "--uts", "--")


def unavailable() -> str:
    """Why there can be no hosts on this machine; empty if there can."""
    if sys.platform != "linux":
        return "hosts of their own need Linux"
    if not shutil.which("unshare") or not shutil.which("nsenter"):
        return "hosts of their own need unshare and nsenter, of util-linux"
    refusal = subprocess.run([*_UNSHARE, "true"], capture_output=True, check=False, text=True)
    if refusal.returncode:
        return f"hosts of their own need root: {refusal.stderr.strip()}"
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return f"hosts of their own need /dev/net/tun: {error.strerror}"
    return ""


class Network:
    """Forwards packets between the hosts that are added to it. Enter it; leaving it ends them.

    `weather` may be changed at any time. `counts` says what became of packets.
    """

    def __init__(self, weather: Weather, *, seed: int = 0) -> None:
        self.weather = weather
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._hosts: dict[bytes, Host] = {}  # by address
        self._opened = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._opened.aclose()

    async def add(self, name: str, *, hidden: tuple[Path, ...] = ()) -> Host:
        """A host on which these folders, which must exist, are empty."""
        address = f"{_SUBNET}{len(self._hosts) + 1}"
        process, tun = await self._opened.enter_async_context(_started(name, address, hidden))
        host = Host(name, address, process, tun)
        self._hosts[socket.inet_aton(address)] = host
        self._loop.add_reader(tun, self._forward, host)
        self._opened.callback(self._remove, host)
        return host

    def cut_off(self, *hosts: Host) -> None:
        """Nothing reaches them, and nothing from them anyone; nobody is told."""
        for host in hosts:
            host.is_cut_off = True

    def join(self, *hosts: Host) -> None:
        """They are reached again."""
        for host in hosts:
            host.is_cut_off = False

    def _remove(self, host: Host) -> None:
        self._loop.remove_reader(host.tun)
        os.close(host.tun)
        del self._hosts[socket.inet_aton(host.address)]

    def _forward(self, sender: Host) -> None:
        for _ in range(_AT_ONCE):
            try:
                packet = os.read(sender.tun, _LARGEST_PACKET)
            except BlockingIOError:
                return
            receiver = self._hosts.get(packet[16:20]) if packet[0] >> 4 == 4 else None
            if receiver is not None:
                self._send(packet, sender, receiver)

    def _send(self, packet: bytes, sender: Host, receiver: Host) -> None:
        weather, drawn, now = self.weather, self._random.random, self._loop.time()
        self.counts["sent"] += 1
        sender.sent[receiver.name] += 1
        takes_s = len(packet) / weather.bytes_per_s
        left_at = max(now, sender.sends_next_at) + takes_s
        arrives_at = max(left_at, receiver.receives_next_at) + takes_s
        if arrives_at - now > _QUEUED_S + 2 * takes_s:
            self.counts["dropped"] += 1
            return
        sender.sends_next_at = left_at
        if drawn() < weather.loss:
            self.counts["lost"] += 1
            return
        receiver.receives_next_at = arrives_at
        if drawn() < weather.reordered:
            self.counts["reordered"] += 1
        else:
            arrives_at += weather.delay_s + drawn() * weather.jitter_s
            arrives_at = max(arrives_at, sender.last_arrival.get(receiver, 0.0))
            sender.last_arrival[receiver] = arrives_at
        copies = 1
        if drawn() < weather.doubled:
            self.counts["doubled"] += 1
            copies = 2
        for _ in range(copies):
            self._loop.call_at(arrives_at, self._arrive, packet, sender, receiver)

    def _arrive(self, packet: bytes, sender: Host, receiver: Host) -> None:
        if sender.is_cut_off or receiver.is_cut_off:
            self.counts["cut off"] += 1
        elif receiver in self._hosts.values():
            with contextlib.suppress(BlockingIOError):  # its queue is full
                os.write(receiver.tun, packet)


@contextlib.asynccontextmanager
async def _started(
    name: str, address: str, hidden: tuple[Path, ...]
) -> AsyncIterator[tuple[int, int]]:
    """The process that is a host, and its device."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *_UNSHARE, sys.executable, "-IS", Path(__file__).with_name("host.py"),
                name, address, *map(str, hidden),
                stdin=theirs.fileno(),
            )  # fmt: skip
        try:
            ours.settimeout(_STARTS_S)
            _, descriptors, _, _ = await asyncio.to_thread(socket.recv_fds, ours, 1, 1)
            assert descriptors, f"host {name} did not start"
            yield process.pid, descriptors[0]
        finally:
            ours.shutdown(socket.SHUT_RDWR)
            await process.wait()
