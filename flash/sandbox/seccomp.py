"""System calls that namespaces do not shut off: those on the kernel's keyrings.

A session's keyring is inherited through all of them, and may hold what its owner logs in with.
"""

import errno
import platform
import struct
from typing import NamedTuple


class _Machine(NamedTuple):
    """How the kernel names it, and its numbers of add_key, request_key and keyctl."""

    audit_arch: int
    first: int
    last: int


_MACHINES = {
    "x86_64": _Machine(0xC000003E, 248, 250),
    "aarch64": _Machine(0xC00000B7, 217, 219),
}
_X32 = 0x40000000  # the bit of the calls of another ABI, on x86_64
_LOAD, _RETURN, _IF_EQUAL, _IF_AT_LEAST = 0x20, 0x06, 0x15, 0x35
_NUMBER, _ARCH = 0, 4  # where they are in what a filter is shown
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000


def without_keyrings() -> bytes:
    """A filter as bubblewrap takes it. ValueError for a machine whose numbers are not known.

    Programs for another kind of machine, as those of 32 bits, have no system calls at all.
    """
    if platform.machine() not in _MACHINES:
        raise ValueError(f"sandboxes are for {' and '.join(_MACHINES)}: this is another machine")
    machine = _MACHINES[platform.machine()]
    program = [
        (_LOAD, 0, 0, _ARCH),
        (_IF_EQUAL, 1, 0, machine.audit_arch),
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
        (_LOAD, 0, 0, _NUMBER),
        (_IF_AT_LEAST, 0, 3, machine.first),
        (_IF_AT_LEAST, 1, 0, _X32),
        (_IF_AT_LEAST, 1, 0, machine.last + 1),
        (_RETURN, 0, 0, _ERROR | errno.EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
