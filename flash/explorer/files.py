"""How a model's files come to explorers that do not share the controller's disk.

Files.path is here, and is what `stamp` says? ─► nothing to do

else, at the controller, with Files.key in the header:
  WebSocket /files   ──►  Manifest   the files, and a checksum of each piece of them
                     ──►  Sources    whom to take pieces from, whenever there are others
                     ◄──  Lost       of a source that fails
                     ◄──  Have       all of it, and where others may take it
  GET /files/NAME         a piece, by Range; also from explorers that have all of it

turns.py says who takes from whom, so that the controller sends about as much as each of them;
file_server.py and fetch.py are the two sides. Folders inside of a folder are left out.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import Struct

from flash.errors import PublishFailure

ROUTE = "/files"
HERE = ""  # a source: the one who names it
HEARTBEAT_S = 20.0  # on either side of the WebSocket

_LARGEST_PIECE_BYTES = 64 << 20
_THREADS = 4  # that compute checksums

T = TypeVar("T")
R = TypeVar("R")


class FetchFailure(PublishFailure):
    """Files did not come to this machine, which says nothing of them, nor of other machines."""


class GoneError(FetchFailure):
    """The controller does not offer these files any more: it has newer ones, or started anew."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a file, which is fetched as a whole."""

    file: str
    offset: int
    size: int
    checksum: bytes  # SHA-256


class FileEntry(Struct, frozen=True, array_like=True):
    name: str
    size: int
    checksums: list[bytes]  # of each piece in turn

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or "/" in self.name or "\0" in self.name:
            raise ValueError(f"{self.name!r} is no file's name")


class Manifest(Struct, frozen=True, tag=True):
    """What is in a folder."""

    piece_bytes: int
    files: list[FileEntry]

    def __post_init__(self) -> None:
        if not 0 < self.piece_bytes <= _LARGEST_PIECE_BYTES:
            raise ValueError(f"pieces of {self.piece_bytes} bytes")
        if any(
            entry.size < 0 or len(entry.checksums) != -(-entry.size // self.piece_bytes)
            for entry in self.files
        ):
            raise ValueError("as many checksums as pieces are needed")

    def pieces(self) -> Iterator[Piece]:
        for entry in self.files:
            for number, checksum in enumerate(entry.checksums):
                offset = number * self.piece_bytes
                size = min(self.piece_bytes, entry.size - offset)
                yield Piece(entry.name, offset, size, checksum)


class Sources(Struct, frozen=True, tag=True):
    """URLs, or HERE."""

    urls: list[str]


class Withdrawn(Struct, frozen=True, tag=True):
    """There is nothing to be had for this key any more."""


class Lost(Struct, frozen=True, tag=True):
    """That source does not answer, or not the truth."""

    url: str


class Have(Struct, frozen=True, tag=True):
    """All of it is here; others may take it at `url`, if that is not empty."""

    url: str


encode = msgspec.msgpack.Encoder().encode
decode_from_server: Callable[[bytes], Manifest | Sources | Withdrawn] = msgspec.msgpack.Decoder(
    Manifest | Sources | Withdrawn
).decode
decode_from_fetcher: Callable[[bytes], Lost | Have] = msgspec.msgpack.Decoder(Lost | Have).decode


def authorization(key: str) -> str:
    """The header that shows a key."""
    return f"Bearer {key}"


def contents_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of each file."""
    contents = {}
    for path in sorted(folder.iterdir()):
        if path.is_file():
            about = path.stat()
            contents[path.name] = (about.st_size, about.st_mtime_ns)
    return contents


def stamp_of(folder: Path) -> str:
    """Tells a folder from all others, and from what it was before: by names, sizes and times."""
    told = hashlib.sha256()
    for name, (size, time_ns) in contents_of(folder).items():
        told.update(f"{name}\0{size}\0{time_ns}\n".encode())
    return told.hexdigest()


def is_here(path: str, stamp: str) -> bool:
    """Whether this machine has that folder, by a disk that it shares, and may read it."""
    folder = Path(path)
    try:
        return folder.is_dir() and stamp_of(folder) == stamp
    except OSError:
        return False


def manifest_of(
    folder: Path, piece_bytes: int, *, wanted: Callable[[], bool] = lambda: True
) -> Manifest:
    """Of what is in the folder, all of which is read. OSError if that can't be, or isn't `wanted`
    any more."""
    sizes = {name: size for name, (size, _) in contents_of(folder).items()}
    parts = [
        (name, offset, min(piece_bytes, size - offset))
        for name, size in sizes.items()
        for offset in range(0, size, piece_bytes)
    ]

    def checksum(part: tuple[str, int, int]) -> bytes:
        if not wanted():
            raise OSError(f"{folder} is wanted no more")
        name, offset, size = part
        data = _read(folder / name, offset, size)
        if len(data) < size:
            raise OSError(f"{folder / name} became shorter")
        return checksum_of(data)

    checksums: dict[str, list[bytes]] = {name: [] for name in sizes}
    for (name, _, _), digest in zip(parts, in_threads(checksum, parts), strict=True):
        checksums[name].append(digest)
    return Manifest(piece_bytes, [FileEntry(name, sizes[name], checksums[name]) for name in sizes])


def missing_in(folder: Path, pieces: list[Piece]) -> list[Piece]:
    """Those of which the folder's files do not have what they should."""

    def is_there(piece: Piece) -> bool:
        return checksum_of(_read(folder / piece.file, piece.offset, piece.size)) == piece.checksum

    found = list(in_threads(is_there, pieces))
    return [piece for piece, there in zip(pieces, found, strict=True) if not there]


def checksum_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _read(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)


def in_threads(compute: Callable[[T], R], parts: Iterable[T]) -> Iterator[R]:
    """What becomes of the parts, in order; the first error ends all."""
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="checksums")
    try:
        yield from pool.map(compute, parts)
    finally:
        pool.shutdown(cancel_futures=True)
