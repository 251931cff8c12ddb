"""Packages built into wheels, as whoever installs them gets them."""

import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path


def build_wheel(folder: Path, names: Iterable[str], source: Path) -> zipfile.ZipFile:
    """The wheel of the package in `folder`, of which a build reads `names`.

    Built in `source`, an empty folder: a build leaves files where it works.
    """
    for name in names:
        (source / name).symlink_to(folder / name)
    build = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    built = subprocess.run(
        [sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True
    )
    return zipfile.ZipFile(source / "dist" / built.stdout.split()[-1])
