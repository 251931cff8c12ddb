"""`python -IS inside.py LIMITS`: the first process in a sandbox, which runs the commands of others.

    host ──(a socket for each command)──→ keeper → attendant → [ init → command → … ]

Its standard input is a socket, through which the host sends the sockets of commands. For each an
attendant is forked, which makes a pid namespace (in brackets) with an init of its own, feeds the
command, keeps what it writes up to a limit, and answers with how it ended. When init ends, or is
killed, the kernel kills all that is in the namespace, whatever sessions it is in. Commands see
neither keeper nor attendant; init, which they see, can't be traced, and no signal of theirs reaches
it. When the keeper ends, as it does when the host closes its socket or dies, so does all of the
sandbox.

Keeper, attendant and init have CAP_SYS_ADMIN over the sandbox, to make namespaces; commands have no
capability, and can't gain one. Run as a file and without packages: it starts once for each episode.
"""

import contextlib
import ctypes
import json
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from typing import Any, NoReturn

HEADER = struct.Struct("!I")
_STATUS = struct.Struct("!i")
MAX_DESCRIPTORS = 4

_CLONE_NEWNS, _CLONE_NEWPID = 0x00020000, 0x20000000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_BIND, _MS_REC = 2, 4, 8, 4096, 16384
_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 1, 4, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_DISK = "/run"  # where all that is writable is mounted for a moment
_INODES_PER_MB = 256
_PIPE_BYTES = 1 << 20  # what a pipe can hold at most
_CHUNK_BYTES = 1 << 16
_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    limits = json.loads(sys.argv[1])
    control = socket.socket(fileno=0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how attendants end
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    _make_writable(limits["folders"], limits["readable"], disk_mb=limits["disk_mb"])
    control.send(b"ready")
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1, MAX_DESCRIPTORS)
        if not message:
            return
        with contextlib.suppress(BlockingIOError):  # no more processes: its socket is closed
            if os.fork() == 0:
                _attend(descriptors, limits["rlimits"])
        for descriptor in descriptors:
            os.close(descriptor)


def _make_writable(folders: list[str], readable: list[str], *, disk_mb: int) -> None:
    """Mounts parts of one file system of that size on the folders.

    `readable` is seen through it where it lies in one of them.
    """
    _call("unshare", _CLONE_NEWNS)
    covered = {
        path: os.open(path, os.O_PATH)
        for path in readable
        if any(path.startswith(f"{folder}/") for folder in folders)
    }
    options = f"size={disk_mb}m,nr_inodes={disk_mb * _INODES_PER_MB},mode=755"
    _mount("tmpfs", _DISK, _MS_NOSUID | _MS_NODEV, kind="tmpfs", options=options)
    for folder in folders:
        part = f"{_DISK}/{folder.replace('/', '_')}"
        os.mkdir(part)
        _mount(part, folder, _MS_BIND)
    _call("umount2", _DISK.encode(), _MNT_DETACH)
    for path, descriptor in covered.items():
        is_folder = os.path.isdir(f"/proc/self/fd/{descriptor}")
        os.makedirs(path if is_folder else os.path.dirname(path), exist_ok=True)
        if not is_folder:
            open(path, "x").close()
        _mount(f"/proc/self/fd/{descriptor}", path, _MS_BIND | _MS_REC)
        os.close(descriptor)


def _attend(descriptors: list[int], rlimits: dict[str, int]) -> NoReturn:
    """In an attendant: one command, from its request to its answer."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        connection = socket.socket(fileno=descriptors[0])
        request, stdin = _receive(connection)
        theirs = descriptors[1:]
        feed, outputs = _Feed(stdin), []
        if not theirs:
            outputs = [_Output(request["output_bytes"]) for _ in range(2)]
            theirs = [feed.open(), *(output.open() for output in outputs)]
        status, init = _start(request, theirs, rlimits)
        for descriptor in theirs:
            os.close(descriptor)
        ended = _watch(connection, status, feed, outputs, seconds=request["seconds"])
        os.kill(init, signal.SIGKILL)
        os.waitpid(init, 0)  # which has waited for all of its namespace
        said = os.read(status, _STATUS.size)
        if ended == "exited" and not said:  # somebody has killed init
            ended = "killed"
        for output in outputs:
            output.drain()
        answer = {
            "returncode": _STATUS.unpack(said)[0] if ended == "exited" else None,
            "ended": ended,
            "cut": any(output.cut for output in outputs),
            "sizes": [len(output.kept) for output in outputs],
        }
        header = json.dumps(answer).encode()
        connection.sendall(HEADER.pack(len(header)) + header)
        for output in outputs:
            connection.sendall(output.kept)
    finally:
        os._exit(0)


def _watch(
    connection: socket.socket,
    status: int,
    feed: "_Feed",
    outputs: "list[_Output]",
    *,
    seconds: float | None,
) -> str:
    """Until the command has ended, its time is over, or the host has no more interest."""
    deadline = time.monotonic() + seconds if seconds is not None else None
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ, "abandoned")
        selector.register(status, selectors.EVENT_READ, "exited")
        if feed.writing is not None:
            selector.register(feed.writing, selectors.EVENT_WRITE, feed)
        for output in outputs:
            selector.register(output.reading, selectors.EVENT_READ, output)
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return "deadline"
            for key, _ in selector.select(left):
                if isinstance(key.data, str):
                    return key.data
                if not key.data.move():
                    selector.unregister(key.fileobj)
                    os.close(key.fd)


class _Feed:
    """What a command is given to read."""

    def __init__(self, data: bytes) -> None:
        self.writing: int | None = None
        self._left = memoryview(data)

    def open(self) -> int:
        """The end that the command reads."""
        reading, self.writing = os.pipe()
        os.set_blocking(self.writing, False)
        return reading

    def move(self) -> bool:
        """Some of it; false when there is no more, or nobody reads it."""
        assert self.writing is not None
        try:
            self._left = self._left[os.write(self.writing, self._left) :]
        except BrokenPipeError:
            return False
        return len(self._left) > 0


class _Output:
    """What a command writes, of which so many bytes are kept."""

    def __init__(self, limit: int) -> None:
        self.reading = -1
        self.kept = bytearray()
        self._limit = limit
        self.cut = False

    def open(self) -> int:
        """The end that the command writes to."""
        self.reading, writing = os.pipe()
        os.set_blocking(self.reading, False)
        return writing

    def move(self) -> bool:
        """Some of it; false when it is closed."""
        data = os.read(self.reading, _CHUNK_BYTES)
        room = self._limit - len(self.kept)
        self.kept += data[:room]
        self.cut = self.cut or len(data) > room
        return bool(data)

    def drain(self) -> None:
        """Takes what is left in the pipe.

        No more than a pipe holds: another command may have been handed its other end.
        """
        with contextlib.suppress(OSError):  # empty, or closed before
            for _ in range(_PIPE_BYTES // _CHUNK_BYTES):
                if not self.move():
                    break


def _start(request: dict[str, Any], streams: list[int], rlimits: dict[str, int]) -> tuple[int, int]:
    """Where the exit code will be told, and the init of the command's namespace."""
    status, tell = os.pipe()
    _call("unshare", _CLONE_NEWPID | _CLONE_NEWNS)
    init = os.fork()
    if init == 0:
        try:
            _init(request, streams, rlimits, tell)
        except OSError as error:
            os.write(streams[2], f"no process can be made for it: {error}\n".encode())
        finally:
            os._exit(1)
    os.close(tell)
    return status, init


def _init(request: dict[str, Any], streams: list[int], rlimits: dict[str, int], tell: int) -> None:
    """In init: starts the command, and waits for it and for orphans."""
    _close_all_but([*streams, tell])
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _mount("proc", "/proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, kind="proc")
    _drop_capabilities()
    command = os.fork()
    if command == 0:
        try:
            _become(request, streams, rlimits)
        finally:
            os._exit(127)
    _close_all_but([tell])
    while True:
        ended, status = os.wait()
        if ended == command:
            os.write(tell, _STATUS.pack(os.waitstatus_to_exitcode(status)))
            return


def _become(request: dict[str, Any], streams: list[int], rlimits: dict[str, int]) -> None:
    """In the command's process: the command; or it says on its stderr why it can't be run."""
    os.setsid()
    for target, descriptor in enumerate(streams):
        os.dup2(descriptor, target)
    _close_all_but([])
    for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    _call("prctl", _PR_SET_DUMPABLE, 1, 0, 0, 0)
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("1000")  # where memory ends, commands go first
    for name, limit in rlimits.items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    argv = request["argv"]
    try:
        os.chdir(request["cwd"])
        os.execvpe(argv[0], argv, request["env"])
    except (OSError, ValueError) as error:
        os.write(2, f"{argv[0]!r} in {request['cwd']!r} can't be run: {error}\n".encode())


def _drop_capabilities() -> None:
    _call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    header = struct.pack("Ii", _CAPABILITY_VERSION_3, 0)
    _call("capset", header, bytes(24))


def _receive(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    """A request, and what the command is given to read."""
    with connection.makefile("rb", buffering=0) as stream:
        request = json.loads(_exactly(stream, *HEADER.unpack(_exactly(stream, HEADER.size))))
        return request, _exactly(stream, request["stdin_bytes"])


def _exactly(stream: Any, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        data += stream.read(size - len(data)) or sys.exit()
    return bytes(data)


def _close_all_but(kept: list[int]) -> None:
    """And but for the standard streams."""
    first = 3
    for descriptor in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
        os.closerange(first, descriptor)
        first = descriptor + 1


def _mount(what: str, folder: str, flags: int, *, kind: str = "", options: str = "") -> None:
    texts = [text.encode() for text in (what, folder, kind)]
    _call("mount", *texts, ctypes.c_ulong(flags), options.encode())


def _call(name: str, *args: Any) -> None:
    """A system call, by the C library. OSError."""
    if getattr(_libc, name)(*args) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
