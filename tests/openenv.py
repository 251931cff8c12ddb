"""OpenEnv's own servers for tests, in a Python of their own, for it takes a hundred packages."""

import contextlib
import fcntl
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

_PACKAGE = "openenv-core==0.3.0"
_VENV = Path(sys.prefix) / "openenv"
_ECHO = _VENV / "parrot_env"
_APPS = Path(__file__).parent / "environments"


def python() -> Path:
    """A Python that has the package, and beside it the environment that `openenv init` makes.

    Made once; skips the test where it can't be installed.
    """
    uv = shutil.which("uv", path=f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        pytest.skip(f"needs {_PACKAGE}, and uv to install it")
    made, ready = _VENV / "bin" / "python", _VENV / _PACKAGE
    with Path(f"{_VENV}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side
        if not ready.exists():
            for command in (
                [uv, "venv", "--clear", "--python", sys.executable, str(_VENV)],
                [uv, "pip", "install", "--python", str(made), _PACKAGE],
                [made.with_name("openenv"), "init", _ECHO.name, "--output-dir", str(_VENV)],
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    pytest.skip(f"needs {_PACKAGE}: {done.stdout[-300:]}{done.stderr[-300:]}")
            ready.touch()
    return made


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
