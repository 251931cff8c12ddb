"""What the C library does with large blocks that are freed between small ones."""

import subprocess
import sys

import pytest

ALTERNATE = """
from pathlib import Path

def used():
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) * 1024

bytearray(b"x") * (16 << 20)  # freed at once: from now on glibc keeps blocks of this size
before = used()
large, small = [], []
for _ in range(50):
    large.append(bytearray(b"x") * (4 << 20))
    small.append(bytearray(b"x") * (64 << 10))
large.clear()
print(used() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's")
@pytest.mark.parametrize(
    ("first", "gives_back"),
    [("", False), ("from flash.system.heap import *; give_large_blocks_back()", True)],
)
def test_large_blocks_are_the_systems_again_as_soon_as_they_are_freed(first, gives_back):
    told = subprocess.check_output([sys.executable, "-c", first + ALTERNATE], text=True)
    assert (int(told) < 20e6) == gives_back
