"""What tests with a sandbox need, and what they look for. `.ci/run` installs bubblewrap."""

import contextlib
import shutil

import psutil
import pytest

needs_sandbox = pytest.mark.skipif(
    shutil.which("bwrap") is None,
    reason="bubblewrap is not installed: apt-get install bubblewrap",
)
MARK = "flash-in-a-sandbox"
"""An argument of commands, by which they are found from outside."""


def marked() -> list[int]:
    """The processes on this machine with that argument."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if MARK in process.cmdline():
                found.append(process.pid)
    return found
