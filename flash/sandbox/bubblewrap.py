"""The command line of a sandbox by bubblewrap, and whether this machine can have one."""

import contextlib
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from flash.sandbox.sandbox import WORK, SandboxUnavailable
from flash.sandbox.seccomp import without_keyrings

FOLDERS = (WORK, "/tmp", "/dev/shm")
"""What is writable in each."""

_NOBODY = 65534  # who we are in a sandbox where root opens it
_IDS = ("--uid", "1000", "--gid", "1000")  # as seen from inside
_INSIDE = Path(__file__).with_name("inside.py")
_INSIDE_THERE = "/.flash/inside.py"
_SYSTEM = (
    "/usr", "/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d",
    "/etc/localtime",
)  # fmt: skip
_OF_USR = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
_USERS = b"root:x:0:0::/:/bin/sh\nsandbox:x:1000:1000::/tmp:/bin/sh\n"
_GROUPS = b"root:x:0:\nsandbox:x:1000:\n"
# What lies in folders that are closed to nobody, as root's own is, is mounted where it is not, in a
# mount namespace of its own. Of /sys nothing is needed here, so it has room for that.
_OPENING = """
mount -t tmpfs -o mode=755 none /sys || exit
while [ "$1" != -- ]; do
  if [ -d "$1" ]; then mkdir -p "/sys$1"; else mkdir -p "/sys${1%/*}" && : > "/sys$1"; fi
  mount --rbind "$1" "/sys$1" || exit
  shift
done
shift
exec "$@"
"""


@contextlib.contextmanager
def command_line(
    argument: str, *, seen: Sequence[Path], folders: Sequence[str], joins: Path | None
) -> Iterator[tuple[list[str], list[int]]]:
    """What opens a sandbox and runs `inside.py` in it, and the descriptors that it is to inherit.

    `seen` is what is seen of this machine, `joins` a file that processes join a control group by.
    Raises SandboxUnavailable for a command that is not installed.
    """
    check_installed()
    with contextlib.ExitStack() as opened:
        descriptors: list[int] = []

        def given(descriptor: int) -> str:
            opened.callback(os.close, descriptor)
            descriptors.append(descriptor)
            return str(descriptor)

        is_root = os.geteuid() == 0
        closed = [path for path in seen if is_root and _is_closed(path)]
        mounts = [word for folder in ("/run", *folders) for word in ("--dir", folder)]
        for path in seen:
            mounts += ["--ro-bind", f"/sys{path}" if path in closed else str(path), str(path)]
        for path in map(Path, _OF_USR):
            if path.is_symlink():
                mounts += ["--symlink", str(path.readlink()), str(path)]
        command = [
            "bwrap", "--unshare-all", "--unshare-user", "--disable-userns", *_IDS,
            "--hostname", "sandbox", "--die-with-parent", "--new-session", "--as-pid-1",
            "--cap-drop", "ALL", "--cap-add", "CAP_SYS_ADMIN", "--clearenv",
            "--proc", "/proc", "--dev", "/dev",
            *mounts, "--remount-ro", "/dev",
            "--ro-bind-data", given(_memory(_USERS)), "/etc/passwd",
            "--ro-bind-data", given(_memory(_GROUPS)), "/etc/group",
            "--ro-bind-data", given(os.open(_INSIDE, os.O_RDONLY)), _INSIDE_THERE,
            "--remount-ro", "/", "--chdir", "/", "--seccomp", given(_memory(without_keyrings())),
            "--", sys.executable, "-IS", _INSIDE_THERE, argument,
        ]  # fmt: skip
        if is_root:
            nobody = str(_NOBODY)
            command = [
                *("setpriv", "--reuid", nobody, "--regid", nobody, "--clear-groups", "--"),
                *command,
            ]
        if closed:
            command = [
                *("unshare", "--mount", "--propagation", "private"),
                *("sh", "-c", _OPENING, "sh", *map(str, closed), "--", *command),
            ]
        if joins is not None:
            command = ["sh", "-c", 'echo 0 > "$0" && exec "$@"', str(joins), *command]
        yield command, descriptors


def python_path() -> str:
    """PATH in a sandbox: this Python's own commands first."""
    return os.pathsep.join(
        dict.fromkeys(
            (f"{sys.prefix}/bin", f"{sys.base_prefix}/bin", "/usr/local/bin", "/usr/bin", "/bin")
        )
    )


def check_installed() -> None:
    """Raises SandboxUnavailable for a command that is not there, or an unknown kind of machine."""
    try:
        without_keyrings()
    except ValueError as error:
        raise SandboxUnavailable(str(error)) from error
    needs = ["bwrap", *(("unshare", "mount", "setpriv") if os.geteuid() == 0 else ())]
    packages = {"bwrap": "bubblewrap", "mount": "mount"}
    for name in needs:
        if shutil.which(name) is None:
            package = packages.get(name, "util-linux")
            raise SandboxUnavailable(
                f"a local sandbox needs {name!r}, which is not installed: run `apt-get install "
                f"{package}`, or what this system has in its place"
            )


def seen_of(readable: Sequence[Path]) -> list[Path]:
    """What is seen of this machine: those above first, and none that is seen with another."""
    wanted = {
        *map(Path, _SYSTEM),
        *(path for path in map(Path, _OF_USR) if not path.is_symlink()),
        *map(Path, (sys.prefix, sys.base_prefix)),
        *(path.absolute() for path in readable),
    }
    seen: list[Path] = []
    for path in sorted(path for path in wanted if path.exists()):
        if not any(path.is_relative_to(above) for above in seen):
            seen.append(path)
    return seen


def _is_closed(path: Path) -> bool:
    """Whether not everybody can pass the folders above."""
    return not all(above.stat().st_mode & stat.S_IXOTH for above in path.resolve().parents)


def _memory(content: bytes) -> int:
    """A descriptor of a file that has no name."""
    descriptor = os.memfd_create("sandbox")
    os.write(descriptor, content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
