"""OpenEnv's own servers for tests, in a Python of their own, for it takes a hundred packages."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests import venvs

_PACKAGE = "openenv-core==0.3.0"
_VENV = Path(sys.prefix) / "openenv"
_ECHO = _VENV / "parrot_env"
_APPS = Path(__file__).parent / "environments"


def python() -> Path:
    """A Python that has the package, and beside it the environment that `openenv init` makes."""
    init = [_VENV / "bin" / "openenv", "init", _ECHO.name, "--output-dir", _VENV]
    return venvs.python(_VENV.name, _PACKAGE, init)


@contextlib.contextmanager
def server() -> Iterator[str]:
    """The URL of a process that serves `openenv_app.py`."""
    interpreter = python()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port, descriptor = listening.getsockname()[1], listening.fileno()
        process = subprocess.Popen(
            [
                *(interpreter, "-m", "uvicorn", "openenv_app:app"),
                *("--fd", str(descriptor), "--log-level", "critical"),
            ],
            cwd=_APPS,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(_ECHO)},
            pass_fds=[descriptor],
        )
    # Who connects before the server is there waits: the socket listens already.
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()
