"""`python guard.py FD COMMAND …`: runs the command in a process group that ends when FD does.

FD is the reading end of a pipe; that the other end is closed, or its owner dead, is the sign.
Run as a file and without packages, because it starts once for each episode.
"""

import contextlib
import os
import signal
import sys
import threading


def main() -> int:
    """The exit code of the command, as a shell tells it."""
    lifeline, command = int(sys.argv[1]), sys.argv[2:]
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.close(lifeline)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"{command[0]} can't be run: {error.strerror}\n".encode())
        os._exit(127)
    with contextlib.suppress(OSError):  # it has done so itself already
        os.setpgid(child, child)

    def end_with_lifeline() -> None:
        os.read(lifeline, 1)
        _kill(child)

    threading.Thread(target=end_with_lifeline, daemon=True).start()
    _, status = os.waitpid(child, 0)
    _kill(child)  # what it left in the background
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
