"""What this machine has, found out without importing torch."""

import errno
import importlib.util
import os
import socket
from pathlib import Path


def has_vllm() -> bool:
    """Whether some build of vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


Gpu = int | str
"""As CUDA_VISIBLE_DEVICES names it: by its number, or a UUID as in GPU-1234."""


def gpus(dev: Path = Path("/dev")) -> list[Gpu]:
    """The NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # CUDA counts those that it sees: the only one of a container may be /dev/nvidia3, and is 0.
    count = sum(path.name[len("nvidia") :].isdigit() for path in dev.glob("nvidia[0-9]*"))
    if visible is None:
        return list(range(count))
    names = [name.strip() for name in visible.split(",")]
    return [
        int(name) if name.isdigit() else name
        for name in names
        if (name.isdigit() and int(name) < count) or name.startswith(("GPU-", "MIG-"))
    ]


def check_port(host: str, port: int, given: str) -> None:
    """ValueError if nobody can listen there now: found out before models are loaded for minutes.

    `given`: how the port was asked for.
    """
    if not 0 <= port < 1 << 16:
        raise ValueError(f"{given}: must be 0 to 65535; 0 lets the system choose")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ValueError(f"{given} on {host}: {error.strerror}") from error
            raise ValueError(
                f"{given} is in use on {host}: choose another, or 0 for a free one"
            ) from error
