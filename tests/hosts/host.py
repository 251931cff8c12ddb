"""The process that is a host: it keeps the namespaces in which it was started, until it is left.

Started by `network.py`, with a socket to it as its input. It makes a TUN device here, whose file
descriptor it sends there: what this host sends can be read from it, and what is written to it this
host receives.
"""

import fcntl
import os
import socket
import struct
import subprocess
import sys

DEVICE = b"tun0"
MASK = "255.255.255.0"
MTU = 1500

# linux/if_tun.h, linux/sockios.h, linux/if.h
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x1, 0x1000
SIOCSIFADDR, SIOCSIFNETMASK, SIOCSIFMTU, SIOCSIFFLAGS = 0x8916, 0x891C, 0x8922, 0x8914
IFF_UP, IFF_RUNNING = 0x1, 0x40


def main(name: str, address: str, *hidden: str) -> None:
    socket.sethostname(name)
    for folder in hidden:
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", DEVICE, IFF_TUN | IFF_NO_PI))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:

        def configure(request: int, value: bytes, device: bytes = DEVICE) -> None:
            fcntl.ioctl(any_socket, request, struct.pack("16s24s", device, value))

        configure(SIOCSIFFLAGS, struct.pack("H", IFF_UP | IFF_RUNNING), b"lo")
        configure(SIOCSIFADDR, _internet(address))
        configure(SIOCSIFNETMASK, _internet(MASK))
        configure(SIOCSIFMTU, struct.pack("i", MTU))
        configure(SIOCSIFFLAGS, struct.pack("H", IFF_UP | IFF_RUNNING))
    with socket.socket(fileno=sys.stdin.fileno()) as network:
        socket.send_fds(network, [b"."], [tun])
        os.close(tun)
        network.recv(1)  # nothing comes: until the other end is closed


def _internet(address: str) -> bytes:
    """A sockaddr_in."""
    return struct.pack("HH4s8x", socket.AF_INET, 0, socket.inet_aton(address))


if __name__ == "__main__":
    main(*sys.argv[1:])
