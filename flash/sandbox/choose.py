"""Which sandbox a name stands for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from flash.sandbox.local import LocalSandbox, check_local
from flash.sandbox.sandbox import Limits, Sandbox

Kind = Literal["local"]
_LIMITS = Limits()


def check_sandbox(kind: Kind) -> None:
    """Raises SandboxUnavailable, with the remedy, if this machine has none of that kind.

    Opens one, which blocks for a tenth of a second.
    """
    assert kind == "local", "the configuration has no other"
    check_local()


def open_sandbox(
    kind: Kind = "local",
    *,
    limits: Limits = _LIMITS,
    readable: Sequence[Path] = (),
    writable: Sequence[str] = (),
) -> Sandbox:
    """A sandbox to be entered: `async with open_sandbox() as sandbox`.

    Args:
        readable: files and folders of this machine that are seen in it, at their own paths, beside
            the system and this Python with its packages.
        writable: folders at its root that may be written to, beside /work, /tmp and /dev/shm.
    """
    assert kind == "local", "the configuration has no other"
    return LocalSandbox(limits, readable, writable)
