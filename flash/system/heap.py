"""The heap of this process, as far as the C library lets it be told."""

import ctypes

_M_MMAP_THRESHOLD = -3  # of mallopt, in malloc.h
_LARGE_BYTES = 1 << 20


def give_large_blocks_back() -> None:
    """From now on a block of a MiB and more is the system's again as soon as it is freed.

    By itself glibc keeps those of up to 32 MiB once some were freed, in a heap that others of its
    blocks keep from shrinking. Elsewhere nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
