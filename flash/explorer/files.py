"""How a model's files come to explorers that do not share the controller's disk.

Files.path is here, and is what `stamp` says? ─► nothing to do
else ─► GET /files/KEY           the manifest: sizes, checksums of pieces; who has all of it
        GET /files/KEY/NAME      a piece of a file, by Range, from the controller or a peer
"""

import asyncio
import hashlib
from pathlib import Path

from flash.explorer.messages import Files


def stamp_of(folder: Path) -> str:
    """Tells a folder from all others, and from what it was before: by names, sizes and times."""
    told = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file():
            about = path.stat()
            told.update(f"{path.name}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
    return told.hexdigest()


async def offered(folder: Path) -> Files:
    """What an explorer is told of a folder here."""
    whole = await asyncio.to_thread(folder.resolve)
    return Files(path=str(whole), stamp=await asyncio.to_thread(stamp_of, whole), key="")


def is_here(path: str, stamp: str) -> bool:
    """Whether this machine has that folder, by a disk that it shares."""
    folder = Path(path)
    return folder.is_dir() and stamp_of(folder) == stamp
