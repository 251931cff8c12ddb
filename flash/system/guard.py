"""`python guard.py FD COMMAND …`: runs the command, and ends it with all that it started.

FD is the reading end of a pipe; that the other end is closed, or its owner dead, is the sign. What
comes through it is handed on as SIGTERM to the command alone, which may take its time.
What the command starts in a session of its own does not get away: on Linux an orphan becomes a
child of this process, by PR_SET_CHILD_SUBREAPER. Run as a file and without packages, because it
starts once for each episode.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
from collections.abc import Iterator

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_GRACE_S = 4  # what can't be killed must not hold us


def main() -> int:
    """The exit code of the command, as a shell tells it."""
    lifeline, command = int(sys.argv[1]), sys.argv[2:]
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)  # it gets the numbers of the signals that are handled
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    guard, child = os.getpid(), os.fork()
    if child == 0:
        _become(command, guard, lifeline)
    with contextlib.suppress(OSError):  # it has done so itself already
        os.setpgid(child, child)
    status = None
    while status is None:
        readable, _, _ = select.select([lifeline, woken], [], [])
        if lifeline in readable:
            if not os.read(lifeline, 1):
                break
            os.kill(child, signal.SIGTERM)  # it is ours to wait for, so nobody else has its number
        if woken in readable:
            if set(os.read(woken, 4096)) != {signal.SIGCHLD}:
                break
            status = dict(_ended()).get(child)
    signal.alarm(_GRACE_S)
    _kill_all(child)
    code = os.waitstatus_to_exitcode(status) if status is not None else -signal.SIGKILL
    return code if code >= 0 else 128 - code


def _become(command: list[str], guard: int, lifeline: int) -> None:
    """In the child: the command, in a group of its own, which does not outlive its guard."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == guard:  # else it has ended before the line above
        os.setpgid(0, 0)
        os.close(lifeline)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"{command[0]} can't be run: {error.strerror}\n".encode())
    os._exit(127)


def _kill_all(group: int) -> None:
    """SIGKILL to the command's group and to every descendant, until none is left."""
    with contextlib.suppress(OSError):
        os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # no child is left
        while True:
            for pid in _descendants():
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            os.waitpid(-1, 0)  # its children, if it had any, are ours now
            list(_ended())


def _ended() -> Iterator[tuple[int, int]]:
    """Of the children that have ended, the command or orphans, process id and status."""
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            yield ended


def _descendants() -> set[int]:
    """All processes below this one; none where there is no /proc."""
    parents: dict[int, int] = {}
    with contextlib.suppress(FileNotFoundError):
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat", "rb") as stat:
                parents[int(name)] = int(stat.read().rpartition(b")")[2].split()[1])
    family = {os.getpid()}
    while below := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= below
    return family - {os.getpid()}


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


if __name__ == "__main__":
    sys.exit(main())
