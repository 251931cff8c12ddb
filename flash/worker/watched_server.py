"""`python -m flash.worker.watched_server MODULE …`: a server, of which nothing is left behind.

Engines of vLLM and SGLang outlive an API server that is killed. So this process starts the server,
as `python -m MODULE` with the same arguments, and only watches: when the server ends, or it is told
to end, or its own parent does, the whole process group goes.
"""

import os
import signal
import subprocess
import sys
from types import FrameType

from flash.system.process import die_with_parent

_GRACE_S = 4.0


def main(arguments: list[str]) -> None:
    """Runs the server until it ends or SIGTERM comes; then kills the process group, itself too."""
    signal.signal(signal.SIGTERM, _told_to_end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    if os.getpgrp() != os.getpid():
        os.setpgrp()  # started by hand: a group of our own, that no one else dies with
    try:
        die_with_parent(signal.SIGTERM)
        server = subprocess.Popen([sys.executable, "-m", *arguments])
        try:
            code = server.wait()
            print(f"the server ended with exit code {code}", file=sys.stderr, flush=True)
        except _End:
            server.terminate()
            server.wait(_GRACE_S)
    finally:
        os.killpg(0, signal.SIGKILL)


class _End(BaseException):
    """SIGTERM came."""


def _told_to_end(number: int, frame: FrameType | None) -> None:
    raise _End


if __name__ == "__main__":
    main(sys.argv[1:])
