"""What this machine has, found out without importing torch."""

import errno
import importlib.util
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def where() -> str:
    """This machine, in a word."""
    return socket.gethostname()


def has_vllm() -> bool:
    """Whether some build of vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def has_sglang() -> bool:
    """Whether SGLang is installed."""
    return importlib.util.find_spec("sglang") is not None


_OPEN_FILES = 65_536  # no more is of use; some programs walk through all numbers of files


def raise_open_file_limit() -> None:
    """As many files as this process may allow itself: each connection is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def open_file_limit() -> int:
    """How many files this process may have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _OPEN_FILES if soft == resource.RLIM_INFINITY else soft


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


_ASK_S = 20.0


def compute_capability() -> tuple[int, int] | None:
    """That of the oldest NVIDIA GPU, by its driver; None if it does not tell."""
    try:
        told = [line.split(".") for line in _told_of_gpus("compute_cap")]
        return min((int(major), int(minor)) for major, minor in told)
    except ValueError:
        return None


def gpu_memory() -> int | None:
    """Bytes of the largest NVIDIA GPU, by its driver; None if it does not tell."""
    try:
        return max(int(mebibytes) << 20 for mebibytes in _told_of_gpus("memory.total"))
    except ValueError:
        return None


def _told_of_gpus(what: str) -> list[str]:
    """What the driver says of each GPU; nothing if it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.stdout.splitlines() if line.strip()]


_REMEDIES = {
    errno.ENOSPC: "make room on that disk, or write elsewhere (runs_dir, --out, $TMPDIR); a "
    "container's /dev/shm, where weights are handed over, grows with --shm-size",
    errno.EDQUOT: "make room in your quota, or write elsewhere (runs_dir, --out, $TMPDIR)",
    errno.EROFS: "name a place that can be written to (runs_dir, --out, $TMPDIR)",
    errno.EACCES: "give yourself the right to it, or name another place (runs_dir, --out)",
    errno.EPERM: "give yourself the right to it, or name another place (runs_dir, --out)",
    errno.EMFILE: "allow more open files (ulimit -n 65536), or take fewer engine.workers, "
    "env.hosts and engine.max_running",
    errno.ENFILE: "end what else runs on this machine: all of its open files are used",
    errno.ENOMEM: "take fewer engine.workers, trainer.ranks and env.hosts, or a smaller batch_size",
    errno.EAGAIN: "allow more processes (ulimit -u), or take fewer engine.workers and env.hosts",
    errno.ENOENT: "see that it is there, and that nobody removes it under a run",
    errno.ENOTDIR: "name a folder",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EFBIG: "allow larger files (ulimit -f)",
    errno.EIO: "see whether the disk is whole",
}


def remedy(message: str) -> str:
    """What can be done about the machine's error that a message tells of; empty if it does not.

    By its words, which Python's errors, those of libraries and of child processes all repeat.
    """
    if "MemoryError" in message:
        return _REMEDIES[errno.ENOMEM]
    known = (what for number, what in _REMEDIES.items() if os.strerror(number) in message)
    return next(known, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """How much a process may have of a machine."""

    cores: int
    memory_bytes: int
    gpus: Sequence[Gpu]
    open_files: int

    def __str__(self) -> str:
        gpus = f"{len(self.gpus) or 'no'} GPU{'' if len(self.gpus) == 1 else 's'}"
        return (
            f"this machine ({self.cores} cores, {self.memory_bytes / 1e9:.1f} GB of memory, {gpus})"
        )


_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def capacity(limit: Path = _CGROUP_LIMIT) -> Capacity:
    """Of this machine, or of its container, whose memory the file `limit` tells."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if limit.is_file() and (allowed := limit.read_text().strip()).isdigit():
        memory = min(memory, int(allowed))
    on_linux = hasattr(os, "sched_getaffinity")
    _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
    return Capacity(
        cores=len(os.sched_getaffinity(0)) if on_linux else os.cpu_count() or 1,
        memory_bytes=memory,
        gpus=gpus(),
        open_files=sys.maxsize if files == resource.RLIM_INFINITY else files,
    )


def how_to_install(what: str, clone: Path = Path(__file__).parents[2]) -> str:
    """The command that adds vLLM, SGLang, or an extra of ours: a clone has a Makefile for some."""
    if what == "sglang":
        return "`pip install sglang`"
    if (clone / "Makefile").is_file():
        return "`make setup-vllm`" if what == "vllm" else "`make setup`"
    return "`pip install vllm`" if what == "vllm" else f"`pip install 'flash-rl[{what}]'`"


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
                raise ValueError(
                    f"{given} on {host}: {error.strerror}: choose an address of this machine, and "
                    f"a port that you may use"
                ) from error
            raise ValueError(
                f"{given} is in use on {host}: choose another, or 0 for a free one"
            ) from error
