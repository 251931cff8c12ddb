"""The processes of a run, by what they are for."""

import contextlib
from pathlib import Path

# What is in the command of each; the guard of it has that in its own command, too.
_MODULES = {
    "rank": "flash.trainer",
    "worker": "flash.worker",
    "host": "flash.environments.host",
    "reward": "flash.reward.host",
}
_GUARD = "guard.py"


def victims(controller: int, role: str, *, guards: bool = False) -> list[int]:
    """The processes of that role which the controller has now, or their guards."""
    return [
        pid
        for pid in descendants(controller)
        if _MODULES[role] in (words := _command(pid))
        and guards == any(_GUARD in word for word in words)
    ]


def descendants(pid: int) -> list[int]:
    """All processes below this one."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    family = {pid}
    while below := {child for child, parent in parents.items() if parent in family} - family:
        family |= below
    return sorted(family - {pid})


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:
        return []
