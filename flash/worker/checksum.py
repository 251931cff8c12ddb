"""Whether two processes have read the same weight files; imports no torch."""

import zlib
from pathlib import Path

import numpy as np

_WORD_BYTES = 8


def checksum(directory: Path) -> str:
    """Of the safetensors in a directory: names, sizes, and the sum of their 8-byte words.

    It finds files that are cut short, old or mixed, at the speed of memory; it is no defence
    against somebody who forges them.
    """
    summary = 0
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        words = np.memmap(file, np.uint64, mode="r", shape=size // _WORD_BYTES)
        line = f"{file.name} {size} {int(words.sum(dtype=np.uint64))}"
        summary = zlib.crc32(line.encode(), summary)
    return f"{summary:08x}"
