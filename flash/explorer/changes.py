"""What makes a folder of weights out of the one before: few of a step's bfloat16 values change.

    before, after ─► write_changes ─► a folder: NAME.changes of each file of weights, others whole
    before, that  ─► apply_changes ─► after, to be verified by its checksums: files.py

Words of 2 bytes are compared, whatever they stand for. One that changed costs a byte for how many
before it did not, and a byte for its difference: most become a bfloat16 number nearby. Where words
are halves of float32 numbers nearly all change; then nothing is written.

Of each chunk: three sizes, then the steps between changes (255: so many and no change), the
differences (-128: too large), and the words whose difference is.
"""

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from flash.explorer.files import contents_of, in_threads

Words = NDArray[np.uint16]

_SUFFIX = ".changes"
_WEIGHTS = ".safetensors"
# Larger ones are fetched whole: what is saved must be worth comparing, and writing it twice.
_MOST = 0.5
_CHUNK_WORDS = 1 << 20
# After so many, what was compared stands for the rest: in float32 that need not be looked at.
_FIRST_BYTES = 64 << 20
_NO_WORDS: Words = np.empty(0, np.uint16)
_SIZES = struct.Struct("<III")
_NO_CHANGE, _LARGE = 255, -128


def write_changes(before: Path, after: Path, into: Path) -> bool:
    """Whether they are few enough to be written; if not, `into` is not there.

    OSError if one of the folders can't be read, or not any more.
    """
    old, new = contents_of(before), contents_of(after)
    most = _MOST * sum(size for size, _ in new.values())
    into.mkdir()
    written = compared = 0
    too_many = False
    for name, (size, _) in new.items():
        if not name.endswith(_WEIGHTS) or name not in old or old[name][0] != size:
            written += size
            if written <= most:
                shutil.copyfile(after / name, into / name)
        else:
            with (into / (name + _SUFFIX)).open("wb") as file:
                for part in _parts(before / name, after / name, size):
                    written += file.write(part)
                    compared += 2 * _CHUNK_WORDS
                    if too_many := written > _MOST * max(compared, _FIRST_BYTES):
                        break
        if too_many or written > most:
            shutil.rmtree(into)
            return False
    return True


def apply_changes(before: Path, changes: Path, into: Path) -> None:
    """Writes into `into` what `changes` make of `before`; files there are replaced.

    ValueError if they are not of that folder.
    """
    into.mkdir(parents=True, exist_ok=True)
    for path in changes.iterdir():
        if path.name.endswith(_SUFFIX):
            name = path.name.removesuffix(_SUFFIX)
            _apply(before / name, path, into / name)
        else:
            shutil.copyfile(path, into / path.name)


def _parts(before: Path, after: Path, size: int) -> Iterator[bytes]:
    """What becomes of each chunk in turn, and the byte behind the last word."""
    old, new = _words(before, size), _words(after, size)

    def part(start: int) -> bytes:
        return _difference(old[start : start + _CHUNK_WORDS], new[start : start + _CHUNK_WORDS])

    yield from in_threads(part, range(0, size // 2, _CHUNK_WORDS))
    if size % 2:
        with after.open("rb") as file:
            file.seek(size - 1)
            yield file.read(1)


def _words(path: Path, size: int) -> Words:
    if size < 2:
        return _NO_WORDS  # nothing can be mapped
    return np.memmap(path, np.uint16, mode="r", shape=size // 2)


def _difference(old: Words, new: Words) -> bytes:
    places = np.flatnonzero(old != new).astype(np.int32)
    between = np.diff(places, prepend=np.int32(-1)) - 1
    ends = np.cumsum(between // _NO_CHANGE + 1)
    steps = np.full(ends[-1] if len(ends) else 0, _NO_CHANGE, np.uint8)
    steps[ends - 1] = between % _NO_CHANGE
    values = new[places]
    differences = (values - old[places]).view(np.int16)
    large = (differences <= _LARGE) | (differences > -_LARGE - 1)
    small = differences.astype(np.int8)
    small[large] = _LARGE
    rest = values[large]
    sizes = _SIZES.pack(len(steps), len(small), len(rest))
    return b"".join((sizes, steps.tobytes(), small.tobytes(), rest.tobytes()))


def _apply(before: Path, changes: Path, into: Path) -> None:
    shutil.copyfile(before, into)
    size = into.stat().st_size
    words = np.memmap(into, np.uint16, mode="r+", shape=size // 2) if size >= 2 else _NO_WORDS

    def change(part: tuple[int, bytes]) -> None:
        start, data = part
        _change(words[start : start + _CHUNK_WORDS], data)

    with changes.open("rb") as source:
        parts = [(n, _next_part(source)) for n in range(0, len(words), _CHUNK_WORDS)]
        last = source.read()
    for _ in in_threads(change, parts):
        pass
    if len(last) != size % 2:
        raise ValueError(f"{changes} is not of {before}: {len(last)} bytes are left of it")
    if last:
        with into.open("r+b") as file:
            file.seek(size - 1)
            file.write(last)


def _next_part(source: BinaryIO) -> bytes:
    sizes = source.read(_SIZES.size)
    if len(sizes) == _SIZES.size:
        steps, small, rest = _SIZES.unpack(sizes)
        data = source.read(steps + small + 2 * rest)
        if len(data) == steps + small + 2 * rest:
            return sizes + data
    raise ValueError("the changes end before the file does")


def _change(words: Words, part: bytes) -> None:
    """In place."""
    of_steps, of_small, of_rest = _SIZES.unpack_from(part)
    steps = np.frombuffer(part, np.uint8, of_steps, _SIZES.size)
    small = np.frombuffer(part, np.int8, of_small, _SIZES.size + of_steps)
    rest = np.frombuffer(part[_SIZES.size + of_steps + of_small :], np.uint16, of_rest)
    changes = steps != _NO_CHANGE
    places = np.cumsum(steps + changes, dtype=np.int64)[changes] - 1
    large = small == _LARGE
    if len(places) != len(small) or large.sum() != len(rest) or (places[-1:] >= len(words)).any():
        raise ValueError("the changes are of another file")
    values = words[places] + small.astype(np.int16).view(np.uint16)
    values[large] = rest
    words[places] = values
