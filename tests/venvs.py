"""Pythons of their own for tests, with what can't be installed beside us, or is too much."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


def python(
    name: str, package: str, *then: Sequence[str | Path], beside: Sequence[str | Path] = ()
) -> Path:
    """An interpreter that has the package, and what is installed with it.

    Made once, beside this one, and after that `then` is run; skips the test where it can't be.
    """
    uv = shutil.which("uv", path=f"{Path(sys.prefix) / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        pytest.skip(f"needs {package}, and uv to install it")
    venv = Path(sys.prefix) / name
    made, ready = venv / "bin" / "python", venv / package
    with Path(f"{venv}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run side by side
        if not ready.exists():
            for command in (
                [uv, "venv", "--clear", "--python", sys.executable, venv],
                [uv, "pip", "install", "--python", made, package, *beside],
                *then,
            ):
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    pytest.skip(f"needs {package}: {done.stdout[-300:]}{done.stderr[-300:]}")
            ready.touch()
    return made
